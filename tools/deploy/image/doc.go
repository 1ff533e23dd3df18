// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command image builds the container image of a Go program with ko: the static
// binary and nothing else, no base, no shell, user 65532. Equal sources give an
// equal digest (the commit is a part of them, unless -buildvcs=false).
//
//	image [-platforms linux/amd64,linux/arm64] -to REF|FILE.tar [-insecure] ./cmd/cri-controller
//
// It uses ko's library and not its command, which cannot do without a base image
// from a registry.
package main
