// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package credentialprovider runs kubelet's image credential provider plugins: programs on the node
// that have the credentials of a cloud's registries (KEP-2133). File, protocol and cache are
// kubelet's (pkg/credentialprovider/plugin), so that a node is configured only once.
package credentialprovider
