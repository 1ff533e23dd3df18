// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// commitWithEnvironment is the commit of a controller that knows the pod.
func (n *upNode) commitWithEnvironment(uid string) {
	n.t.Helper()
	_, err := n.api.CommitUpgrade(n.t.Context(), &opsv1.CommitUpgradeRequest{
		Uid: uid, Environments: []*opsv1.ContainerEnvironment{{Name: "app", Environment: &opsv1.Environment{}}},
	})
	n.must(err)
}

// The image that an upgrade commits to may be another one than it was prepared with: the tag has
// moved. It is looked at as the first one was.
func TestCommitLooksAtTheImage(t *testing.T) {
	for _, tc := range []struct {
		name string
		now  *runtimeapi.Image
		want string
		says string
	}{
		{"another one", &runtimeapi.Image{Id: "sha256:other", Uid: &runtimeapi.Int64Value{Value: 1000}}, "", ""},
		{"one that runs as root", &runtimeapi.Image{Id: "sha256:root"}, "FAILED, app FAILED " + opsv1.ReasonImageUnfit,
			"will run as root"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.images.images["app:v2"].Uid = &runtimeapi.Int64Value{Value: 1000}
				n.prepared("op", first(func(c *opsv1.ContainerUpgrade) { c.RunAsNonRoot = true }))
				// another pod's pull has brought it
				n.images.images["app:v2"], n.images.images[tc.now.GetId()] = tc.now, tc.now
				n.commitWithEnvironment("op")
				if tc.want != "" {
					if op := n.ends("op", tc.want, "app/0 RUNNING, web/0 RUNNING"); !strings.Contains(
						op.GetContainers()[0].GetMessage(), tc.says) {
						t.Errorf("it says %q", op.GetContainers()[0].GetMessage())
					}
					return
				}
				n.until("op", opsv1.Phase_PHASE_ARMED)
				if got := n.rt.Get(t, "app/1").Config.GetImage().GetImage(); got != tc.now.GetId() {
					t.Errorf("what waits is of %s", got)
				}
				_, err := n.api.AbortUpgrade(t.Context(), &opsv1.AbortUpgradeRequest{Uid: "op"})
				n.must(err)
			})
		})
	}
}

// A container that has a part of a volume from the volume itself must be looked at before it runs.
// Where that cannot be done, because the runtime takes no gate, it is not made.
func TestPartsNeedTheGate(t *testing.T) {
	n := newNode(t, podOptions{processes: true, mounts: []*runtimeapi.Mount{
		{ContainerPath: "/part", HostPath: "/kubelet/pods/" + podUID + "/volumes/kubernetes.io~empty-dir/e/part"},
	}})
	n.runTidied()
	made := 0
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if !strings.HasPrefix(call, "CreateContainer app/1") {
				return nil
			}
			if made++; made == 1 {
				return fakenode.UnknownContainer("the gate's hook")
			}
			return nil
		}
	})
	n.restart("op")
	op := n.finish("op")
	if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonCreateContainerConfigError; got != want ||
		made != 1 {
		t.Errorf("ended %s (%s) after %d creations, want %s", got, op.GetMessage(), made, want)
	}
	if got := n.rt.State(); got != "app/0 RUNNING, web/0 RUNNING" {
		t.Errorf("runtime has %s", got)
	}
	n.awaitLiving("app/0, web/0")
}
