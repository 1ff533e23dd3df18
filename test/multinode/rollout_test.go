// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package multinode

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// agents returns the pods of the DaemonSet in order when there is a ready one on each node.
func agents(t *testing.T) []corev1.Pod {
	t.Helper()
	list := &corev1.PodList{}
	poll(t, "every node has a ready agent", func() bool {
		must(t, api.List(t.Context(), list, client.InNamespace("default"), client.MatchingLabels{"app": "agent"}))
		ready := 0
		for _, p := range list.Items {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil {
					ready++
				}
			}
		}
		return ready == len(bed.Nodes) && len(list.Items) == ready
	})
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return list.Items
}

func poll(t *testing.T, what string, so func() bool) {
	t.Helper()
	// polling another process
	for deadline := time.Now().Add(3 * time.Minute); !so(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 3 minutes: %s", what)
		}
	}
}

func rolloutStatus(t *testing.T, name string) inplace.InPlaceRolloutStatus {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: name}, r))
	return r.Status
}

// TestRolloutOfDaemonSet changes a DaemonSet over five nodes, with a partition and a pause, and
// back, when one node does not answer for a while.
func TestRolloutOfDaemonSet(t *testing.T) {
	if bed.Pid("n2-kubelet") == 0 {
		t.Fatal("the third node joins in TestImagePullJob")
	}
	var join errgroup.Group
	for _, n := range bed.Nodes[3:] {
		join.Go(func() error { return n.Join(t.Context()) })
	}
	must(t, join.Wait())
	one, two := bed.Image("app:1"), bed.Image("app:2")
	must(t, bed.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: default}
spec:
  updateStrategy: {type: OnDelete}
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - {name: app, image: "%s"}
`, one)))
	before := agents(t)
	apply := func(spec string) {
		must(t, bed.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {name: agent, namespace: default}
spec:
  target: {workloadRef: {kind: DaemonSet, name: agent}}
%s
`, spec)))
	}
	complete := func(image string, restarts int32) {
		t.Helper()
		poll(t, "the rollout is complete", func() bool {
			s := rolloutStatus(t, "agent")
			return s.TargetImages["app"] == image && meta.IsStatusConditionTrue(s.Conditions, inplace.ConditionComplete)
		})
		poll(t, "the pods say so, for which kubelet takes a moment", func() bool {
			return !slices.ContainsFunc(agents(t), func(p corev1.Pod) bool {
				return p.Status.ContainerStatuses[0].Image != image ||
					p.Status.ContainerStatuses[0].RestartCount < restarts
			})
		})
		for i, p := range agents(t) {
			c := p.Status.ContainerStatuses[0]
			if p.UID != before[i].UID || p.Status.PodIP != before[i].Status.PodIP || c.Image != image ||
				c.RestartCount != restarts {
				t.Errorf("pod %s on %s: %+v", p.Name, p.Spec.NodeName, c)
			}
		}
	}
	// Two pods first, and no more while the rollout is paused.
	apply(fmt.Sprintf("  strategy: {partition: 3}\n  containers: [{name: app, image: %q}]", two))
	poll(t, "two pods are updated", func() bool { return rolloutStatus(t, "agent").Updated == 2 })
	apply(fmt.Sprintf("  paused: true\n  strategy: {partition: 0}\n  containers: [{name: app, image: %q}]", two))
	poll(t, "the rollout is paused", func() bool {
		c := meta.FindStatusCondition(rolloutStatus(t, "agent").Conditions, inplace.ConditionProgressing)
		return c != nil && c.Reason == inplace.ReasonPaused
	})
	if s := rolloutStatus(t, "agent"); s.Updated != 2 {
		t.Errorf("paused: %+v", s)
	}
	apply(fmt.Sprintf("  strategy: {maxUnavailable: 2}\n  containers: [{name: app, image: %q}]", two))
	complete(two, 1)

	// And back, while the commands of one node lead nowhere: it is skipped for now, and holds
	// nobody up who can go on.
	must(t, bed.Process("n1-cri-proxy").Signal(syscall.SIGSTOP))
	apply(fmt.Sprintf("  containers: [{name: app, image: %q}]", one))
	poll(t, "the other nodes are updated", func() bool {
		s := rolloutStatus(t, "agent")
		return s.TargetImages["app"] == one && s.Updated == 4
	})
	must(t, bed.Process("n1-cri-proxy").Signal(syscall.SIGCONT))
	complete(one, 2)
}
