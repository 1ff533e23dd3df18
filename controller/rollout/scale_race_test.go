//go:build race

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

// manyNodes is less than without the race detector, which takes ten times as long.
const manyNodes = 50
