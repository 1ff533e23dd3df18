//go:build !failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package failpoint

// Reach does nothing in a release build; see failpoint_on.go.
func Reach(string) {}
