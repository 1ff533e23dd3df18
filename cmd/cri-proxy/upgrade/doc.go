// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package upgrade puts another version of cri-proxy in the place of the one that runs, without a failed call: the units have two
// instances that share the sockets.
package upgrade
