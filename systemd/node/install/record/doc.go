// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package record keeps what kubelet's files were before an installation changed them, and restores
// them.
package record
