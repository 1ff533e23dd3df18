// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"slices"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// A controller of another version reads what this one writes into requests and pods, and finds its
// operations on nodes. These texts must not change.
func TestGolden(t *testing.T) {
	b := newBed(t)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
	defer release()
	b.createWith("a", spec{PodName: "pod", Containers: containers("app", "mesh")}, map[string]string{
		"cri-proxy.io/restart-order": "StartFirst", "cri-proxy.io/parallel-recreate": "true",
	})
	crr := b.until("commanded", func(*request) bool { return len(b.node.Commanded()) == 2 }, "a")
	const want = `{"request":"uid-a","podUID":"pod-uid","nodeName":"node-1","containers":{` +
		`"app":{"containerID":"containerd://old-app","restartCount":0},` +
		`"mesh":{"containerID":"containerd://old-mesh","restartCount":0}},"startFirst":true,"parallel":true}`
	if got := crr.Annotations["cri-proxy.io/accepted"]; got != want {
		t.Errorf("accepted is\n  %s, want\n  %s", got, want)
	}
	if !slices.Contains(crr.Finalizers, "cri-proxy.io/operation") {
		t.Errorf("finalizers %v", crr.Finalizers)
	}
	for _, name := range []string{"app", "mesh"} {
		op := b.node.Operation("uid-a." + name)
		if op.GetRequester() != "ContainerRecreateRequest/ns/a/uid-a" {
			t.Errorf("operation on %s: %v", name, op)
		}
	}
}
