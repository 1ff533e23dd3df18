// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// bed is the node of this run and its clients.
var bed struct {
	*testbed.Bed
	pulls   opsv1.ImagesClient            // on the admin socket
	kubelet runtimeapi.ImageServiceClient // through the proxy
	direct  runtimeapi.ImageServiceClient // around it
	leases  leasesapi.LeasesClient
}

// password is the secret of all tests: it must not be found anywhere on the node.
const password = "hunter2-Zq8vKp"

// waitFor bounds every wait. The machine may be a slow one.
const waitFor = 90 * time.Second

func TestMain(m *testing.M) {
	if socket := os.Getenv(asKubelet); socket != "" {
		os.Exit(beKubelet(socket))
	}
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
	// What is measured at full size is what users run: the race detector makes it several times
	// slower.
	b, err := testbed.Start(ctx, testbed.Options{Mode: testbed.ModeNode, Race: !full(), Log: os.Stderr,
		KeepLogs: func() bool { return failed }})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.Close(ctx)) }()
	disconnect, err := use(b)
	if err != nil {
		return 0, err
	}
	defer disconnect()
	code = m.Run()
	if err := secretsLeft(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	failed = code != 0
	return code, nil
}

// use makes b the bed that the functions of this package work on.
func use(b *testbed.Bed) (disconnect func(), err error) {
	bed.Bed = b
	var conns []*grpc.ClientConn
	disconnect = func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}
	for socket, use := range map[string]func(*grpc.ClientConn){
		b.AdminSocket: func(c *grpc.ClientConn) { bed.pulls = opsv1.NewImagesClient(c) },
		b.ProxySocket: func(c *grpc.ClientConn) { bed.kubelet = runtimeapi.NewImageServiceClient(c) },
		b.RuntimeSocket: func(c *grpc.ClientConn) {
			bed.direct, bed.leases = runtimeapi.NewImageServiceClient(c), leasesapi.NewLeasesClient(c)
		},
	} {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
		if err != nil {
			disconnect()
			return nil, err
		}
		conns = append(conns, conn)
		use(conn)
	}
	return disconnect, nil
}

// otherBed starts a bed of other options, which all functions of this package work on until t ends.
// It takes about two seconds.
func otherBed(t *testing.T, o testbed.Options) {
	t.Helper()
	o.Mode, o.Race, o.Log, o.KeepLogs = testbed.ModeNode, true, os.Stderr, t.Failed
	b, err := testbed.Start(t.Context(), o)
	must(t, err)
	first := bed
	t.Cleanup(func() {
		if err := secretsLeft(); err != nil {
			t.Error(err)
		}
		bed = first
		if err := b.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	disconnect, err := use(b)
	must(t, err)
	t.Cleanup(disconnect)
}

// secretsLeft returns an error when the password of the tests is in the node's state or in a log.
func secretsLeft() error {
	var errs []error
	for _, dir := range []string{bed.StateDir, bed.Logs} {
		errs = append(errs, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // gone meanwhile
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && (bytes.Contains(b, []byte(password)) ||
				bytes.Contains(b, []byte(testbed.RegistryPassword))) {
				err = fmt.Errorf("%s has a password in it", path)
			}
			return err
		}))
	}
	return errors.Join(errs...)
}

// ourLeases returns the leases of pulls that containerd has.
func ourLeases(t testing.TB) []string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	list, err := bed.leases.List(ctx, &leasesapi.ListRequest{})
	must(t, err)
	var ours []string
	for _, l := range list.GetLeases() {
		if strings.HasPrefix(l.GetID(), "cri-proxy") {
			ours = append(ours, l.GetID())
		}
	}
	return ours
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually calls cond until it returns nil.
func eventually(t testing.TB, cond func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(waitFor)
	for {
		err := cond()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatal(err)
		}
	}
}

// full says whether images of tests that measure have their full size.
func full() bool { return os.Getenv("PREPULL_FULL") != "" }

// layerMiB is the size of each of 8 layers: 128 MiB, or the small one.
func layerMiB(small int) int {
	if full() {
		return 128
	}
	return small
}

// scale is how many times as fast limited pulls of such images are.
func scale() int {
	if full() {
		return 4
	}
	return 1
}
