// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package version tells which build of the program this is, from what the go
// command stamped into it.
package version
