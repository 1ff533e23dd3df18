//go:build failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// armed is the failpoint of this process: what the environment variable
// CRI_PROXY_FAILPOINT says or, for processes that get no environment of their own, the file beside the program with
// the ending .failpoint. It is read at the start, so that the next process can be given another.
//
// NAME kills the process at that point. NAME=pause:DIR makes the file DIR/reached there and waits for the file
// DIR/go, so that a test can do to others what it wants to happen at that very moment; later passes do not wait.
// NAME#2 is the second time that the process comes by.
var armed = parseFailpoint(func() string {
	if name := os.Getenv("CRI_PROXY_FAILPOINT"); name != "" {
		return name
	}
	program, err := os.Executable()
	if err != nil {
		return ""
	}
	b, _ := os.ReadFile(program + ".failpoint") // none is the usual case
	return strings.TrimSpace(string(b))
}())

type failpointAction struct {
	name, pause string
	skip        atomic.Int64 // how often it is still to be passed by
}

func parseFailpoint(s string) *failpointAction {
	name, action, _ := strings.Cut(s, "=")
	name, nth, _ := strings.Cut(name, "#")
	a := &failpointAction{name: name, pause: strings.TrimPrefix(action, "pause:")}
	if n, err := strconv.ParseInt(nth, 10, 64); err == nil {
		a.skip.Store(n - 1)
	}
	return a
}

// failpoint does what is armed for the point. Only in test builds.
func failpoint(name string) {
	if name != armed.name || armed.skip.Add(-1) >= 0 {
		return
	}
	if armed.pause == "" {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	_ = os.WriteFile(filepath.Join(armed.pause, "reached"), nil, 0o600)
	for {
		if _, err := os.Stat(filepath.Join(armed.pause, "go")); err == nil {
			return
		}
		time.Sleep(time.Millisecond) // polling another process
	}
}
