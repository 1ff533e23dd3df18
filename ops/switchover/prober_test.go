// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package switchover_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// fakeRuntime answers Status as containerd does.
type fakeRuntime struct {
	runtimeapi.RuntimeServiceClient
	config string                      // empty: Status is not implemented
	before func(context.Context) error // the answer, if it is an error; may be nil
	asked  int
}

func (f *fakeRuntime) Status(
	ctx context.Context, _ *runtimeapi.StatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.StatusResponse, error) {
	f.asked++
	if f.before != nil {
		if err := f.before(ctx); err != nil {
			return nil, err
		}
	}
	if f.config == "" {
		return nil, status.Error(codes.Unimplemented, "method Status not implemented")
	}
	return &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{}, Info: map[string]string{"config": f.config},
	}, nil
}

// node is a prober and what it looks at.
type node struct {
	*switchover.Prober
	runtime    *fakeRuntime
	dir, state string
}

// newNode returns a node. In config and cdiSpecDir DIR stands for the node's directory.
func newNode(t *testing.T, config, best, cdiSpecDir string) *node {
	t.Helper()
	n := &node{dir: t.TempDir(), runtime: &fakeRuntime{}}
	n.state = filepath.Join(n.dir, "state")
	if err := os.Mkdir(n.state, 0o700); err != nil {
		t.Fatal(err)
	}
	n.runtime.config = n.in(config)
	log := logrus.New()
	log.SetOutput(io.Discard)
	n.Prober = switchover.NewProber(switchover.Options{
		StateDir: n.state, Runtime: n.runtime, Log: log, Best: best, CDISpecDir: n.in(cdiSpecDir),
	})
	return n
}

func (n *node) in(s string) string { return strings.ReplaceAll(s, "DIR", n.dir) }

// has returns the methods that are available, and why the first one that is not, is not.
func (n *node) has(t *testing.T) (available, why string) {
	t.Helper()
	var names []string
	for _, m := range n.List() {
		if m.GetAvailable() != (m.GetReason() == "") {
			t.Errorf("method is %v", m)
		}
		if m.GetAvailable() {
			names = append(names, m.GetName())
		} else if why == "" {
			why = m.GetReason()
		}
	}
	return strings.Join(names, " "), why
}

func TestProbe(t *testing.T) {
	for _, tc := range []struct {
		name   string
		config string // DIR is a directory of the test
		method string
		dir    string
		spoil  string // becomes a file
		want   string
		why    string
	}{
		{name: "containerd 2.1", config: `{"cdiSpecDirs":["/etc/cdi","DIR/cdi"]}`, want: "gate pidfd plain"},
		{name: "containerd 2.0", config: `{"enableCDI":true,"cdiSpecDirs":["/etc/cdi","DIR/cdi"]}`,
			want: "gate pidfd plain"},
		{name: "CDI is off", config: `{"enableCDI":false,"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain",
			why: "enable_cdi"},
		{name: "no directories", config: `{"enableCDI":true,"cdiSpecDirs":[]}`, want: "pidfd plain",
			why: "cdi_spec_dirs"},
		{name: "nothing of CDI", config: `{"enableSelinux":true}`, want: "pidfd plain", why: "cdi_spec_dirs"},
		{name: "not JSON", config: `nothing`, want: "pidfd plain", why: "does not tell its configuration"},
		{
			name: "another shape", config: `{"cdiSpecDirs":"DIR/cdi"}`, want: "pidfd plain",
			why: "does not tell its configuration",
		},
		{name: "no status", want: "pidfd plain", why: "Unimplemented"},
		{
			name: "the directory that is set", config: `{"cdiSpecDirs":["DIR/cdi","/var/run/cdi"]}`, dir: "DIR/./cdi/",
			want: "gate pidfd plain",
		},
		{
			name: "a directory that it does not read", config: `{"cdiSpecDirs":["DIR/cdi"]}`, dir: "DIR/other",
			want: "pidfd plain", why: "restart.cdiSpecDir DIR/other",
		},
		{
			name: "not allowed", config: `{"cdiSpecDirs":["DIR/cdi"]}`, method: opsv1.MethodPidfd, want: "pidfd plain",
			why: "restart.method is pidfd",
		},
		{
			name: "only plain", config: `{"cdiSpecDirs":["DIR/cdi"]}`, method: opsv1.MethodPlain, want: "plain",
			why: "restart.method is plain",
		},
		{
			name: "no place for the spec", config: `{"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain",
			why:   "CDI spec: ",
			spoil: "DIR/cdi",
		},
		{
			name: "no place for gates", config: `{"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain",
			why:   "not a directory",
			spoil: "DIR/state/gates",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, tc.config, tc.method, tc.dir)
			if tc.spoil != "" {
				if err := os.WriteFile(n.in(tc.spoil), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got, why := n.has(t); got != "" || !strings.Contains(why, "not answered yet") {
				t.Errorf("before the first probe the node has %q: %s", got, why)
			}
			n.Probe(t.Context())
			got, why := n.has(t)
			if got != tc.want || !strings.Contains(why, n.in(tc.why)) {
				t.Errorf("the node has %s (%s), want %s (%s)", got, why, tc.want, n.in(tc.why))
			}
			_, err := os.Stat(filepath.Join(n.dir, "cdi", "cri-proxy.json"))
			if wrote, gates := err == nil, strings.HasPrefix(tc.want, "gate"); wrote != gates {
				t.Errorf("the CDI spec: %v", err)
			}
			if gates, err := os.ReadDir(filepath.Join(n.state, "gates")); len(gates) > 0 {
				t.Errorf("gates are left: %v, %v", gates, err)
			}
		})
	}
}

// What was found out counts for a while, but not what a runtime says that is away.
func TestProbeAgain(t *testing.T) {
	n := newNode(t, `{"enableCDI":true,"cdiSpecDirs":["/etc/cdi","DIR/cdi"]}`, "", "")
	var later time.Duration
	n.Now = func() time.Time { return time.Now().Add(later) }
	ask := func(want string, asked bool) {
		t.Helper()
		n.runtime.asked = 0
		n.Probe(t.Context())
		if (n.runtime.asked == 1) != asked || n.runtime.asked > 1 {
			t.Errorf("asked %d times", n.runtime.asked)
		}
		if got, why := n.has(t); got != want {
			t.Errorf("the node has %s (%s), want %s", got, why, want)
		}
	}
	n.runtime.before = func(context.Context) error { return status.Error(codes.Unavailable, "gone") }
	ask("pidfd plain", true)
	ask("pidfd plain", true)
	n.runtime.before = nil
	ask("gate pidfd plain", true)
	spec := filepath.Join(n.dir, "cdi", "cri-proxy.json")
	if err := os.Remove(spec); err != nil {
		t.Fatal(err)
	}
	config := n.runtime.config
	n.runtime.config = `{"enableCDI":false}`
	ask("gate pidfd plain", false)
	later += switchover.ProbeAge
	ask("pidfd plain", true)
	ask("pidfd plain", false)
	n.runtime.config = config
	later += switchover.ProbeAge
	ask("gate pidfd plain", true)
	if _, err := os.Stat(spec); err != nil {
		t.Errorf("the spec is not written again: %v", err)
	}
}

// A runtime that has not run a hook is trusted with another one only much later.
func TestHookNotRun(t *testing.T) {
	n := newNode(t, `{"cdiSpecDirs":["DIR/cdi"]}`, "", "")
	var later time.Duration
	n.Now = func() time.Time { return time.Now().Add(later) }
	n.Probe(t.Context())
	n.HookNotRun()
	for range 2 {
		if got, why := n.has(t); got != "pidfd plain" || !strings.Contains(why, "without running its hook") {
			t.Errorf("after %s the node has %s (%s)", later, got, why)
		}
		later += switchover.ProbeAge
		n.Probe(t.Context())
	}
	later += switchover.NoHookAge
	n.Probe(t.Context())
	if got, why := n.has(t); got != "gate pidfd plain" {
		t.Errorf("after %s the node has %s (%s)", later, got, why)
	}
}

// A probe that hangs holds nobody up who only asks what is known.
func TestProbeHangs(t *testing.T) {
	n := newNode(t, "", "", "")
	ctx, cancel := context.WithCancel(t.Context())
	hangs := make(chan struct{})
	n.runtime.before = func(ctx context.Context) error {
		close(hangs)
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		n.Probe(ctx)
	}()
	<-hangs
	if n.Available(opsv1.MethodPidfd) || !n.Maybe(opsv1.MethodPidfd) {
		t.Error("something is known before the first answer")
	}
	if got, _ := n.has(t); got != "" {
		t.Errorf("the node has %s", got)
	}
	cancel()
	awaitClosed(t, probed)
}
