// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package installer runs `cri-proxy install` on the node of a privileged pod, for clusters whose
// nodes nobody logs in to. See deploy/installer.
package installer
