// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// restartWith restarts container app, changed, and waits until that has succeeded.
func restartWith(
	t testing.TB, pod *corev1.Pod, uid string, change func(*opsv1.ContainerRestart),
) *opsv1.ContainerOperation {
	t.Helper()
	c := &opsv1.ContainerRestart{Name: "app"}
	change(c)
	_, err := opsClient(t).Restart(t.Context(), &opsv1.RestartRequest{
		Uid:        uid + "-" + string(pod.UID),
		Pod:        &opsv1.PodRef{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)},
		Containers: []*opsv1.ContainerRestart{c}, Requester: "test",
	})
	must(t, err)
	return inPhase(t, uid+"-"+string(pod.UID), opsv1.Phase_PHASE_SUCCEEDED).GetContainers()[0]
}

// overridesOf returns the image overrides of the pod.
func overridesOf(t testing.TB, pod *corev1.Pod) []*opsv1.ImageOverride {
	t.Helper()
	l, err := opsClient(t).ListOverrides(t.Context(), &opsv1.ListOverridesRequest{})
	must(t, err)
	return slices.DeleteFunc(l.GetOverrides(),
		func(o *opsv1.ImageOverride) bool { return o.GetPod().GetUid() != string(pod.UID) })
}

// TestOverride runs another image than the pod's spec says: through a crash of the container, of
// the proxy and of kubelet, and back.
func TestOverride(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	one, two := bed.Image("busybox:1.0"), bed.Image("busybox:2.0")
	apply(t, upgradable(ns, "shop", dir, "", corev1.RestartPolicyAlways))
	before := ready(t, ns, "shop")
	began(t, dir, "shop", "1.0")
	// shows waits until the pod's status has that many restarts of app, and the last one with the
	// image.
	shows := func(restarts int32, image string) corev1.ContainerStatus {
		t.Helper()
		var c corev1.ContainerStatus
		eventually(t, "the pod shows image "+image, func() bool {
			c = container(t, getPod(t, ns, "shop"), "app")
			return c.RestartCount == restarts && c.Image == image && c.Ready && c.State.Running != nil
		})
		after := getPod(t, ns, "shop")
		if after.UID != before.UID || after.Status.PodIP != before.Status.PodIP ||
			after.Status.Phase != corev1.PodRunning || after.Spec.Containers[0].Image != one {
			t.Errorf("pod: %s %s %s, image %s", after.UID, after.Status.PodIP, after.Status.Phase,
				after.Spec.Containers[0].Image)
		}
		if n, o := container(t, after, "neighbour"), container(t, before, "neighbour"); n.ContainerID != o.ContainerID {
			t.Errorf("neighbour was restarted: %+v", n)
		}
		return c
	}
	op := restartWith(t, before, "override", func(c *opsv1.ContainerRestart) { c.Image = two })
	t.Logf("gap %s by %s", op.GetGap().AsDuration(), op.GetMethod())
	shows(1, two)
	began(t, dir, "shop", "2.0")
	assertKubeletDidNothing(t, ns, "shop", "app")
	if o := overridesOf(t, before); len(o) != 1 || o[0].GetImage() != two || o[0].GetSpecImage() != one ||
		o[0].GetContainer() != "app" {
		t.Errorf("overrides: %v", o)
	}

	restartProxy(t, syscall.SIGKILL)
	kubeletIsThrough(t)
	// In a second: the container must not end before kubectl has heard how its command did.
	kubectl(t, "-n", ns, "exec", "shop", "-c", "app", "--", "sh", "-c", "(sleep 1; kill 1) >/dev/null 2>&1 &")
	crashed := shows(2, two)
	var trace []string
	eventually(t, "the container has begun anew", func() bool {
		trace = traceOf(t, dir, "shop")
		return len(trace) >= 5
	})
	for i := range trace {
		trace[i] = strings.TrimSpace(trace[i])
	}
	if want := []string{"began 1.0", "asked 1.0", "began 2.0", "asked 2.0", "began 2.0"}; !slices.Equal(trace, want) {
		t.Errorf("trace %q, want %q", trace, want)
	}

	restartKubelet(t, syscall.SIGTERM)
	since := len(kubeletCalls(t, "ListContainers"))
	eventually(t, "the new kubelet has looked at its pods", func() bool {
		return len(kubeletCalls(t, "ListContainers")) > since+2
	})
	if c := shows(2, two); c.ContainerID != crashed.ContainerID {
		t.Errorf("the new kubelet made another container: %+v", c)
	}

	restartWith(t, before, "revert", func(c *opsv1.ContainerRestart) { c.RevertImage = true })
	shows(3, one)
	if o := overridesOf(t, before); len(o) != 0 {
		t.Errorf("overrides: %v", o)
	}
	assertNoGates(t)
}
