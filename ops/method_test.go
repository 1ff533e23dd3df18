// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// has returns the methods of the node that are available, and why the first one that is not, is
// not.
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

func TestMethodForContainer(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(c *fakenode.Container)
		want string
	}{
		{name: "as usual", want: opsv1.MethodGate},
		{name: "its own /dev", edit: func(c *fakenode.Container) { c.Config.Mounts[0].ContainerPath = "/dev" },
			want: opsv1.MethodPidfd},
		{name: "another runtime", edit: func(c *fakenode.Container) { c.Process.Handler = "io.containerd.runsc.v1" },
			want: opsv1.MethodPidfd},
		{name: "processes shared",
			edit: func(c *fakenode.Container) { c.Config.Linux.SecurityContext.NamespaceOptions.Pid = 0 },
			want: opsv1.MethodGate},
		{
			name: "processes shared, another runtime", want: opsv1.MethodPlain,
			edit: func(c *fakenode.Container) {
				c.Config.Linux.SecurityContext.NamespaceOptions.Pid = 0
				c.Process.Handler = "io.containerd.kata.v2"
			},
		},
		{name: "nothing is told of it", edit: func(c *fakenode.Container) { c.Process.Silent = true },
			want: opsv1.MethodPlain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{processes: true})
			n.runTidied()
			c := n.rt.Get(t, "app/0")
			id := c.Status.GetId()
			if tc.edit != nil {
				n.rt.Set(func(*fakenode.Runtime) { tc.edit(c) })
			}
			req := n.engine.node.Records.Request(id)
			req.Config = c.Config
			n.engine.node.Records.Created(id, wire(t, req))
			n.restart("op")
			op := n.finish("op")
			if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("operation ended %s (%s)", got, op.GetMessage())
			}
			if got := op.GetContainers()[0].GetMethod(); got != tc.want {
				t.Errorf("method is %s, want %s", got, tc.want)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
}

// A gate that no operation knows is that of a process that died, and is removed; one that is known
// stays.
func TestStrayGates(t *testing.T) {
	n := newNode(t, podOptions{})
	m := n.engine.node.Switchover
	n.must(m.RemoveStray(n.engine.node.Tokens.Has)) // there is no directory yet
	known := n.engine.node.Tokens.New()
	n.must(errors.Join(m.Gate(known).Make(), m.Gate("stray").Make(), m.Gate("").Make(),
		os.WriteFile(filepath.Join(n.state, "gates", "file"), nil, 0o600)))
	n.run()
	for late := time.Now().Add(waitLong); n.gates() != known; time.Sleep(time.Millisecond) { // the start goes on
		if time.Now().After(late) {
			t.Fatalf("gates are %s, want %s", n.gates(), known)
		}
	}
}
