//go:build !failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

// failpoint does nothing in a release build; see failpoint_on.go.
func failpoint(string) {}
