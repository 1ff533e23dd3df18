// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package keyring says which registry credentials are for an image. Nodes and the controller must
// count alike: the controller sends a node nothing but what the node would try.
package keyring
