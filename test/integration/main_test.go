// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// bed is the containerd of this run.
var bed struct {
	runtime           string // socket
	busybox           string // image references
	app, app3         string
	busybox2, missing string
	extra             string // one that no other test uses
	hosts             string // containerd's config_path of registries
	cgroup            string
	node              *testbed.Bed
	dir               string // for sockets and state; its path is short
}

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test bed:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	failed := false
	b, err := testbed.Start(ctx, testbed.Options{Mode: testbed.ModeNode, Direct: true, Log: os.Stderr,
		KeepLogs: func() bool { return failed }})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.Close(ctx)) }()
	bed.runtime, bed.cgroup, bed.hosts = b.RuntimeSocket, b.CgroupParent, b.RegistryHostsDir()
	bed.busybox, bed.app = b.Image("busybox:1.0"), b.Image("app:1")
	bed.extra = b.Image("busybox:3.0")
	bed.node = b
	bed.app3 = b.Image("app:3")
	bed.busybox2 = b.Image("busybox:2.0")
	bed.missing = b.Image("busybox:none")
	bed.dir = filepath.Join(b.RunDir, "t")
	if err := os.Mkdir(bed.dir, 0o755); err != nil {
		return 0, err
	}
	code = m.Run()
	failed = code != 0
	return code, nil
}
