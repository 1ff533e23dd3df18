//go:build failpoint

// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package failpoint

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// armed is the failpoint of this process: the value of the environment variable
// CRI_PROXY_FAILPOINT or, for processes that get no environment of their own, the content of the
// file beside the program with the ending .failpoint. It is read at the start, so that the next
// process can be given another failpoint.
//
// NAME kills the process at that point. NAME=pause:DIR creates the file DIR/reached there and waits
// for the file DIR/go, so that a test can act on others at that very moment; later passes do not
// wait. NAME#2 is the second pass of the process.
var armed = parse(func() string {
	if name := os.Getenv("CRI_PROXY_FAILPOINT"); name != "" {
		return name
	}
	program, err := os.Executable()
	if err != nil {
		return ""
	}
	b, _ := os.ReadFile(program + ".failpoint") // mostly there is none
	return strings.TrimSpace(string(b))
}())

type action struct {
	name, pause string
	skip        atomic.Int64 // how many passes are still to be ignored
}

func parse(s string) *action {
	name, what, _ := strings.Cut(s, "=")
	name, nth, _ := strings.Cut(name, "#")
	a := &action{name: name, pause: strings.TrimPrefix(what, "pause:")}
	if n, err := strconv.ParseInt(nth, 10, 64); err == nil {
		a.skip.Store(n - 1)
	}
	return a
}

// Reach does what is armed for the point.
func Reach(name string) {
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
