// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package version

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Short returns the module version, which for builds between tags is a
// pseudo-version with commit time and hash, and "(devel)" without version control.
func Short() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// Long returns the version, the Go version and the platform in one line.
func Long() string {
	return fmt.Sprintf("cri-proxy %s, %s %s/%s", Short(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
