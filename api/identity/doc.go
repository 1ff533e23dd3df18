// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package identity is what nodes and the controller agree on about their certificates.
package identity
