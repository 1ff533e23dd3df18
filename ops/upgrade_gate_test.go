// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// upgradable is a node with processes whose container app can be upgraded.
func upgradable(t *testing.T) *node {
	t.Helper()
	n := newNode(t,
		podOptions{processes: true,
			annotations: map[string]string{criclone.AnnotationHash: criclone.KubeletHash("app", "")}})
	n.withImages()
	n.runTidied()
	return n
}

func (n *node) withImages() {
	images := newFakeImages()
	n.engine.node.Images.Puller, n.engine.node.Images.Service = images, images
}

// phase waits for a phase of the operation.
func (n *node) phase(p opsv1.Phase) {
	n.t.Helper()
	n.until("op", func(op *opsv1.Operation) bool {
		if op.GetFinishTime() != nil && op.GetPhase() != p {
			n.t.Fatalf("operation ended %s (%s)", verdict(op), op.GetMessage())
		}
		return op.GetPhase() == p
	})
}

// arm brings an upgrade of app to where kubelet may come.
func (n *node) arm() {
	n.t.Helper()
	_, err := n.api.PrepareUpgrade(n.t.Context(), upgradeRequest("op"))
	n.must(err)
	n.phase(opsv1.Phase_PHASE_PREPARED)
	_, err = n.api.CommitUpgrade(n.t.Context(), n.engine.commitRequest("op"))
	n.must(err)
	n.phase(opsv1.Phase_PHASE_ARMED)
	if got, want := n.rt.Living(), "app/0, app/1 waits, web/0"; got != want {
		n.t.Fatalf("alive are %s, want %s", got, want)
	}
}

// kubeletCreates is what follows the stop: kubelet creates and starts the container with the new
// image.
func (n *node) kubeletCreates(image string) (id string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), waitLong)
	defer cancel()
	c := n.containerConfig("app", 1)
	c.Image = &runtimeapi.ImageSpec{Image: "sha256:" + image, UserSpecifiedImage: image}
	c.Annotations[criclone.AnnotationHash] = criclone.KubeletHash("app", image)
	made, err := n.kubelet.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: c,
		SandboxConfig: n.sandboxConfig()})
	n.must(err)
	_, err = n.kubelet.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()})
	n.must(err)
	return made.GetContainerId()
}

// TestUpgradeAtTheGate has kubelet come for a successor that waits at its gate, or does not any
// more.
func TestUpgradeAtTheGate(t *testing.T) {
	const swapped = "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"
	for _, tc := range []struct {
		name   string
		do     func(n *node)
		reboot bool
		method string
		or     string // if the process ends while it is looked at
	}{
		{name: "it waits", method: opsv1.MethodGate},
		{name: "it has died", do: func(n *node) { n.rt.Exit(n.t, "app/1", 137) }, method: opsv1.MethodPidfd},
		{name: "the old one has ended", do: func(n *node) { n.rt.Exit(n.t, "app/0", 3) }, method: opsv1.MethodGate},
		{
			name: "both have ended", method: opsv1.MethodPidfd, or: opsv1.MethodPlain,
			do: func(n *node) {
				n.rt.Exit(n.t, "app/1", 137)
				n.rt.Exit(n.t, "app/0", 3)
			},
		},
		{name: "the next process, it waits", reboot: true, method: opsv1.MethodGate},
		{name: "the next process, it has died", reboot: true, do: func(n *node) { n.rt.Exit(n.t, "app/1", 137) },
			method: opsv1.MethodPidfd},
		{
			name: "the next process, both have ended", reboot: true, method: opsv1.MethodPidfd, or: opsv1.MethodPlain,
			do: func(n *node) {
				n.rt.Exit(n.t, "app/1", 137)
				n.rt.Exit(n.t, "app/0", 3)
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := upgradable(t)
			n.arm()
			incumbent := n.rt.ID(t, "app/0")
			state := ""
			if tc.reboot {
				state = n.crash()
			}
			if tc.do != nil {
				tc.do(n)
			}
			if tc.reboot {
				n.reboot(state)
				n.withImages()
				n.run()
			}
			ctx, cancel := context.WithTimeout(t.Context(), waitLong)
			defer cancel()
			if n.rt.Get(t, "app/0").Status.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				_, err := n.kubelet.StopContainer(ctx,
					&runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 30})
				n.must(err)
			}
			id := n.kubeletCreates("app:v2")
			op := n.finish("op")
			if got := verdict(op); got != succeeded {
				t.Errorf("operation ended %s (%s)", got, op.GetMessage())
			}
			if got := n.rt.State(); got != swapped {
				t.Errorf("runtime has %s", got)
			}
			if got := n.rt.ID(t, "app/1"); got != id {
				t.Errorf("kubelet has %s, there is %s", id, got)
			}
			if got := op.GetContainers()[0].GetMethod(); got != tc.method && (got != tc.or || tc.or == "") {
				t.Errorf("method is %s, want %s", got, tc.method)
			}
			n.checkSwap(t, "app/1, web/0")
		})
	}
	t.Run("aborted", func(t *testing.T) {
		t.Parallel()
		n := upgradable(t)
		n.arm()
		_, err := n.api.AbortUpgrade(t.Context(), &opsv1.AbortUpgradeRequest{Uid: "op"})
		n.must(err)
		n.checkSwap(t, "app/0, web/0")
	})
	t.Run("kubelet wants the old image", func(t *testing.T) {
		t.Parallel()
		n := upgradable(t)
		n.arm()
		_, err := n.kubelet.StopContainer(t.Context(),
			&runtimeapi.StopContainerRequest{ContainerId: n.rt.ID(t, "app/0"), Timeout: 30})
		n.must(err)
		n.kubeletCreates("app:v1")
		if got, want := verdict(n.finish("op")), "FAILED, app FAILED TakenBackByKubelet"; got != want {
			t.Errorf("operation ended %s, want %s", got, want)
		}
		n.checkOnlyLiving(t, "app/1, web/0")
	})
}

// commitRequest commits an upgrade as a caller does who knows that what was prepared still holds.
func (e *engine) commitRequest(uid string) *opsv1.CommitUpgradeRequest {
	req := &opsv1.CommitUpgradeRequest{Uid: uid}
	if o := e.Lookup(uid); o != nil {
		for _, c := range o.Request().GetContainers() {
			req.Environments = append(req.Environments, &opsv1.ContainerEnvironment{Name: c.GetName()})
		}
	}
	return req
}
