// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package bypassstate is the file in the state directory that says that the proxy is bypassed,
// since when and why. `cri-proxy bypass` writes it; the daemon and other commands read it.
package bypassstate
