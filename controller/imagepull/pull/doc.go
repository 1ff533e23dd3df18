// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pull reads what a node says of a pull: how far the pull is, why an attempt failed, when
// the node is to get credentials again, and when the time of the pull is over.
package pull
