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
	for deadline := time.Now().Add(90 * time.Second); !so(); time.Sleep(50 * time.Millisecond) { // polling another process
		if time.Now().After(deadline) {
			t.Fatalf("not within 90 s: %s", what)
		}
	}
}

func rolloutStatus(t *testing.T, name string) inplace.InPlaceRolloutStatus {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: name}, r))
	return r.Status
}

// TestRolloutOfDaemonSet changes a DaemonSet over three nodes, of which one does not answer for a while.
func TestRolloutOfDaemonSet(t *testing.T) {
	if bed.Pid("n2-kubelet") == 0 {
		t.Fatal("the third node joins in TestImagePullJob")
	}
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
	// The commands of one node lead nowhere: it is skipped for now, and holds nobody up who can go on.
	must(t, bed.Process("n1-cri-proxy").Signal(syscall.SIGSTOP))
	must(t, bed.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {name: agent, namespace: default}
spec:
  target: {workloadRef: {kind: DaemonSet, name: agent}}
  containers: [{name: app, image: "%s"}]
`, two)))
	poll(t, "the other nodes are updated", func() bool { return rolloutStatus(t, "agent").Updated == 2 })
	must(t, bed.Process("n1-cri-proxy").Signal(syscall.SIGCONT))
	poll(t, "the rollout is complete", func() bool {
		return meta.IsStatusConditionTrue(rolloutStatus(t, "agent").Conditions, inplace.ConditionComplete)
	})
	after := agents(t)
	for i, p := range after {
		c := p.Status.ContainerStatuses[0]
		if p.UID != before[i].UID || p.Status.PodIP != before[i].Status.PodIP || c.Image != two || c.RestartCount != 1 {
			t.Errorf("pod %s on %s: %+v", p.Name, p.Spec.NodeName, c)
		}
	}
}
