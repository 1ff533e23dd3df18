//go:build failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"os"
	"strings"
	"syscall"
)

// armed is the failpoint of this process: what the environment variable
// CRI_PROXY_FAILPOINT says or, for processes that get no environment of their own, the file beside the program with
// the ending .failpoint. It is read at the start, so that the next process can be given another.
var armed = func() string {
	if name := os.Getenv("CRI_PROXY_FAILPOINT"); name != "" {
		return name
	}
	program, err := os.Executable()
	if err != nil {
		return ""
	}
	b, _ := os.ReadFile(program + ".failpoint") // none is the usual case
	return strings.TrimSpace(string(b))
}()

// failpoint kills the process without warning if it is the armed one. Only in test builds.
func failpoint(name string) {
	if name == armed {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}
