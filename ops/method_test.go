// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// has returns the methods of the node that are available, and why the first one that is not, is not.
func (n *node) has() (available, why string) {
	n.t.Helper()
	info, err := n.api.NodeInfo(n.t.Context(), &opsv1.NodeInfoRequest{})
	n.must(err)
	var names []string
	for _, m := range info.GetRestartMethods() {
		if m.GetAvailable() != (m.GetReason() == "") {
			n.t.Errorf("method is %v", m)
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
		method Method
		dir    string
		spoil  func(*node)
		want   string
		why    string
	}{
		{name: "containerd 2.1", config: `{"cdiSpecDirs":["/etc/cdi","DIR/cdi"]}`, want: "gate pidfd plain"},
		{name: "containerd 2.0", config: `{"enableCDI":true,"cdiSpecDirs":["/etc/cdi","DIR/cdi"]}`, want: "gate pidfd plain"},
		{name: "CDI is off", config: `{"enableCDI":false,"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain", why: "enable_cdi"},
		{name: "no directories", config: `{"enableCDI":true,"cdiSpecDirs":[]}`, want: "pidfd plain", why: "cdi_spec_dirs"},
		{name: "nothing of CDI", config: `{"enableSelinux":true}`, want: "pidfd plain", why: "cdi_spec_dirs"},
		{name: "not JSON", config: `nothing`, want: "pidfd plain", why: "does not tell its configuration"},
		{name: "another shape", config: `{"cdiSpecDirs":"DIR/cdi"}`, want: "pidfd plain", why: "does not tell its configuration"},
		{name: "no status", want: "pidfd plain", why: "Unimplemented"},
		{name: "the directory that is set", config: `{"cdiSpecDirs":["DIR/cdi","/var/run/cdi"]}`, dir: "DIR/./cdi/", want: "gate pidfd plain"},
		{name: "a directory that it does not read", config: `{"cdiSpecDirs":["DIR/cdi"]}`, dir: "DIR/other", want: "pidfd plain", why: "restart.cdiSpecDir DIR/other"},
		{name: "not allowed", config: `{"cdiSpecDirs":["DIR/cdi"]}`, method: opsv1.MethodPidfd, want: "pidfd plain", why: "restart.method is pidfd"},
		{name: "only plain", config: `{"cdiSpecDirs":["DIR/cdi"]}`, method: opsv1.MethodPlain, want: "plain", why: "restart.method is plain"},
		{
			name: "no place for the spec", config: `{"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain", why: "CDI spec: ",
			spoil: func(n *node) { n.must(os.WriteFile(filepath.Join(n.dir, "cdi"), nil, 0o600)) },
		},
		{
			name: "no place for gates", config: `{"cdiSpecDirs":["DIR/cdi"]}`, want: "pidfd plain", why: "not a directory",
			spoil: func(n *node) { n.must(os.WriteFile(filepath.Join(n.state, "gates"), nil, 0o600)) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{method: tc.method})
			in := func(s string) string { return strings.ReplaceAll(s, "DIR", n.dir) }
			n.rt.set(func(f *fakeRuntime) { f.config = in(tc.config) })
			n.engine.methods.cdiSpecDir = in(tc.dir)
			if tc.spoil != nil {
				tc.spoil(n)
			}
			if got, why := n.has(); got != "" || !strings.Contains(why, "not answered yet") {
				t.Errorf("before the first probe the node has %q: %s", got, why)
			}
			n.engine.switchover.Probe(t.Context())
			got, why := n.has()
			if got != tc.want || !strings.Contains(why, in(tc.why)) {
				t.Errorf("the node has %s (%s), want %s (%s)", got, why, tc.want, in(tc.why))
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
	n := newNode(t, podOptions{processes: true})
	ask := func(want string, asked bool) {
		t.Helper()
		n.rt.takeCalls()
		n.engine.switchover.Probe(t.Context())
		if got := strings.Join(n.rt.takeCalls(), " "); (got == "Status") != asked {
			t.Errorf("asked %q", got)
		}
		if got, why := n.has(); got != want {
			t.Errorf("the node has %s (%s), want %s", got, why, want)
		}
	}
	n.rt.set(func(f *fakeRuntime) {
		f.before = func(string) error { return status.Error(codes.Unavailable, "gone") }
	})
	ask("pidfd plain", true)
	ask("pidfd plain", true)
	n.rt.set(func(f *fakeRuntime) { f.before = nil })
	ask("gate pidfd plain", true)
	spec := filepath.Join(n.dir, "cdi", "cri-proxy.json")
	n.must(os.Remove(spec))
	config := n.rt.config
	n.rt.set(func(f *fakeRuntime) { f.config = `{"enableCDI":false}` })
	ask("gate pidfd plain", false)
	old := func() { n.engine.methods.probed = time.Now().Add(-probeAge) }
	old()
	ask("pidfd plain", true)
	ask("pidfd plain", false)
	n.rt.set(func(f *fakeRuntime) { f.config = config })
	old()
	ask("gate pidfd plain", true)
	if _, err := os.Stat(spec); err != nil {
		t.Errorf("the spec is not written again: %v", err)
	}
}

// A probe that hangs holds nobody up who only asks what is known.
func TestProbeHangs(t *testing.T) {
	n := newNode(t, podOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	hangs := make(chan struct{})
	n.rt.set(func(f *fakeRuntime) {
		f.hang = func(ctx context.Context, call string) error {
			if call != "Status" {
				return nil
			}
			close(hangs)
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		}
	})
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		n.engine.switchover.Probe(ctx)
	}()
	<-hangs
	if n.engine.switchover.Available(opsv1.MethodPidfd) || !n.engine.switchover.Maybe(opsv1.MethodPidfd) {
		t.Error("something is known before the first answer")
	}
	if got, _ := n.has(); got != "" {
		t.Errorf("the node has %s", got)
	}
	cancel()
	awaitClosed(t, probed)
}

func TestMethodForContainer(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(c *fakeContainer)
		want Method
	}{
		{name: "as usual", want: opsv1.MethodGate},
		{name: "its own /dev", edit: func(c *fakeContainer) { c.config.Mounts[0].ContainerPath = "/dev" }, want: opsv1.MethodPidfd},
		{name: "another runtime", edit: func(c *fakeContainer) { c.process.handler = "io.containerd.runsc.v1" }, want: opsv1.MethodPidfd},
		{name: "processes shared", edit: func(c *fakeContainer) { c.config.Linux.SecurityContext.NamespaceOptions.Pid = 0 }, want: opsv1.MethodGate},
		{
			name: "processes shared, another runtime", want: opsv1.MethodPlain,
			edit: func(c *fakeContainer) {
				c.config.Linux.SecurityContext.NamespaceOptions.Pid = 0
				c.process.handler = "io.containerd.kata.v2"
			},
		},
		{name: "nothing is told of it", edit: func(c *fakeContainer) { c.process.silent = true }, want: opsv1.MethodPlain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			c := n.rt.get(t, "app/0")
			id := c.status.GetId()
			if tc.edit != nil {
				n.rt.set(func(*fakeRuntime) { tc.edit(c) })
			}
			req := n.engine.records.request(id)
			req.Config = c.config
			n.engine.records.Created(id, wire(t, req))
			n.restart("op")
			op := n.finish("op")
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s (%s)", got, op.GetMessage())
			}
			if got := op.GetContainers()[0].GetMethod(); got != string(tc.want) {
				t.Errorf("method is %s, want %s", got, tc.want)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// A gate that no operation knows is that of a process that died, and is removed; one that is known stays.
func TestStrayGates(t *testing.T) {
	n := newNode(t, podOptions{})
	m := n.engine.methods
	n.must(m.removeStray(n.engine.knows)) // there is no directory yet
	known := n.engine.newToken()
	n.must(errors.Join(m.gate(known).Make(), m.gate("stray").Make(), m.gate("").Make(), os.WriteFile(filepath.Join(m.gatesDir, "file"), nil, 0o600)))
	n.run()
	for late := time.Now().Add(waitLong); n.gates() != known; time.Sleep(time.Millisecond) { // the start goes on
		if time.Now().After(late) {
			t.Fatalf("gates are %s, want %s", n.gates(), known)
		}
	}
}
