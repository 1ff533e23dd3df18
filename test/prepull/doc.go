// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package prepull tests pre-pulls on a real node: the cri-proxy binary, containerd and an
// image registry, with a front before the registry that counts what is fetched and misbehaves as
// real ones do.
//
// PREPULL_FULL=1 makes the images of the tests that measure 1 GiB large, in 8 layers; without, they
// are an eighth of that or less.
package prepull
