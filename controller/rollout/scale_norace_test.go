//go:build !race

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

const manyNodes = 500
