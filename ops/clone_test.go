// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

const someToken = "0123456789abcdef0123456789abcdef"

// What kubelet changed while the proxy was not in its path is known to the runtime only.
func TestResourcesChangedPastTheProxy(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	id := n.rt.ID(t, "app/0")
	update := func(by runtimeapi.RuntimeServiceServer, cpus string, shares int64) {
		t.Helper()
		_, err := by.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: cpus, CpuShares: shares},
		})
		n.must(err)
	}
	_, err := n.kubelet.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1", CpuPeriod: 9},
	})
	n.must(err)
	update(n.rt, "2-3", 200)
	n.rt.Set(func(f *fakenode.Runtime) { f.Containers[id].Status.Resources.Linux.CpuPeriod = 0 }) // not reported
	n.restart("op")
	if op := n.finish("op"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
		t.Fatalf("operation ended %v", op)
	}
	want := &runtimeapi.LinuxContainerResources{CpuShares: 200, CpusetCpus: "2-3", CpuPeriod: 9}
	if got := n.rt.Get(t, "app/1").Config.GetLinux().GetResources(); !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// What the runtime gets for the successor, from kubelet's own bytes and from the runtime's record.
func TestSuccessorIsAClone(t *testing.T) {
	for _, older := range []bool{false, true} {
		t.Run(map[bool]string{false: "recorded", true: "older than the proxy"}[older], func(t *testing.T) {
			n := newNode(t, podOptions{hidden: older})
			n.run()
			id := n.rt.ID(t, "app/0")
			if _, err := n.kubelet.UpdateContainerResources(t.Context(),
				&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id,
					Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1"}}); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(n.dir, "links"), 0o700); err != nil {
				t.Fatal(err)
			}
			n.restart("op")
			if op := n.finish("op"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
				t.Fatalf("operation ended %v", op)
			}
			c := n.rt.Get(t, "app/1")
			want := n.containerConfig("app", 1)
			token := c.Config.GetAnnotations()[view.StagedAnnotation]
			if len(token) != 32 {
				t.Errorf("token is %q", token)
			}
			want.Annotations[view.StagedAnnotation] = token
			want.Mounts[0].HostPath = filepath.Join(n.terminationDir("app"), token[:8])
			want.Linux.Resources.CpusetCpus = "1"
			if older {
				want.Envs = nil
			} else if !bytes.Equal(c.Config.GetEnvs()[0].GetValue(), []byte{0xff, 0xfe, 'a'}) {
				t.Errorf("environment is %q, want kubelet's bytes", c.Config.GetEnvs())
			}
			if !proto.Equal(c.Config, want) {
				t.Errorf("got  %v\nwant %v", c.Config, want)
			}
			if st, err := os.Stat(want.Mounts[0].HostPath); err != nil || st.Mode().Perm() != 0o666 {
				t.Errorf("termination file: %v, %v", st, err)
			}
			link := filepath.Join(n.dir, "links", "shop_default_app-"+c.Status.GetId()+".log")
			if to, err := os.Readlink(link); err != nil || to != "/var/log/pods/shop/app/1.log" {
				t.Errorf("log symlink leads to %q, %v", to, err)
			}
			// The successor can be restarted in its turn, from what was recorded of it.
			n.restart("again")
			if op := n.finish("again"); verdict(op) != "SUCCEEDED, app SUCCEEDED" {
				t.Fatalf("operation ended %v", op)
			}
			if got := n.rt.Get(t, "app/2").Config; got.GetLogPath() != "app/2.log" ||
				got.GetAnnotations()[criclone.AnnotationRestartCount] != "2" || got.GetLinux().GetResources().
				GetCpusetCpus() != "1" {
				t.Errorf("the next one is %v", got)
			}
		})
	}
}

// Without a record, what JSON cannot tell must not be guessed.
func TestOlderContainerThatCannotBeCloned(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*fakenode.Container)
		want string
	}{
		"not UTF-8": {
			func(c *fakenode.Container) {
				c.Config.Envs = []*runtimeapi.KeyValue{{Key: "BLOB", Value: []byte{0xff}}}
			},
			"BLOB is not UTF-8"},
		"no config": {func(c *fakenode.Container) { c.Config = nil }, "does not tell its config"},
		"a field of a later CRI": {func(c *fakenode.Container) {
			c.Told = `{"config":{"metadata":{"name":"app"},"linux":{"Resources":{"cpu_shares":1,"cpu_burst":7}},"mounts":[{"container_path":"/a","gone":null},{"Idmap":{"a":1}}]}}`
		}, "tells of config.linux.Resources.cpu_burst, config.mounts[1].Idmap, which this version"},
		"a field of another type": {func(c *fakenode.Container) { c.Told = `{"config":{"metadata":7}}` }, "cannot be read"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, podOptions{hidden: true})
			n.run()
			c := n.rt.Get(t, "app/0")
			n.rt.Set(func(*fakenode.Runtime) { tc.edit(c) })
			n.restart("op")
			op := n.finish("op")
			if got, want := verdict(op), "FAILED, app FAILED CreateFailed"; got != want ||
				!strings.Contains(op.GetMessage(), tc.want) {
				t.Errorf("operation ended %s: %s", got, op.GetMessage())
			}
			if got, want := n.rt.State(), "app/0 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s", got)
			}
		})
	}
}
