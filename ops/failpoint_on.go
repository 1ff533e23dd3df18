//go:build failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"os"
	"syscall"
)

// failpoint kills the process without warning at the point that the environment
// variable CRI_PROXY_FAILPOINT names, once per process. Only in test builds.
func failpoint(name string) {
	if os.Getenv("CRI_PROXY_FAILPOINT") == name {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}
