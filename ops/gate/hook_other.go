// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build !amd64 && !arm64

package gate

// hook does not exist for this architecture.
var hook []byte
