// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"testing"
)

// bed is the containerd of this run.
var bed struct {
	runtime string // socket
	busybox string // image references
	app     string
	cgroup  string
	dir     string
}

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test bed:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	_ = context.Background()
	bed.runtime = os.Getenv("CRI_PROXY_TEST_RUNTIME")
	bed.busybox = "localhost:5000/busybox:1.0"
	bed.cgroup = "/cri-proxy-it"
	dir, err := os.MkdirTemp("/root/lab", "it")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	bed.dir = dir
	return m.Run(), nil
}
