// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package multinode

import (
	"fmt"
	"slices"
	"syscall"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// create makes a job whose image takes some two seconds on each node.
func create(t *testing.T, name, policy string) (reference string) {
	t.Helper()
	must(t, bed.PushLargeImage(t.Context(), name+":1", 2, 6))
	must(t, bed.KubectlApply(t.Context(), fmt.Sprintf(`
apiVersion: apps.kruise.io/v1beta1
kind: ImagePullJob
metadata:
  name: %s
  namespace: default
  annotations: {cri-proxy.io/bytes-per-second: 6Mi}
spec:
  image: %s
  parallelism: 1
  completionPolicy: {type: %s}
`, name, bed.Image(name+":1"), policy)))
	return bed.Image(name + ":1")
}

func reason(job *v1beta1.ImagePullJob) string {
	if c := meta.FindStatusCondition(job.Status.Conditions, v1beta1.ConditionComplete); c != nil {
		return c.Reason
	}
	return ""
}

// pulledOnce checks that the first three nodes have the image, pinned, and pulled it once, one
// after the other.
func pulledOnce(t *testing.T, job *v1beta1.ImagePullJob, reference string) {
	t.Helper()
	var all []*opsv1.PullOperation
	for _, n := range bed.Nodes[:3] {
		// containerd's CRI plugin learns of labels by an event.
		poll(t, "the image is pinned on "+n.NodeName, func() bool { return image(t, n, reference).GetPinned() })
		ops := pulls(t, n, job)
		if len(ops) != 1 || ops[0].GetReason() != "Pulled" {
			t.Fatalf("%s pulled %v", n.NodeName, ops)
		}
		all = append(all, ops[0])
	}
	slices.SortFunc(all, func(a, b *opsv1.PullOperation) int {
		return a.GetCreateTime().AsTime().Compare(b.GetCreateTime().AsTime())
	})
	for i, op := range all[1:] {
		// All nodes have this machine's clock.
		if before := all[i].GetFinishTime().AsTime(); op.GetCreateTime().AsTime().Before(before) {
			t.Errorf("a pull was begun %s before another had ended", before.Sub(op.GetCreateTime().AsTime()))
		}
	}
}

// TestImagePullJob has two nodes, then three.
func TestImagePullJob(t *testing.T) {
	t.Run("a node that joins later is served", func(t *testing.T) {
		reference := create(t, "stays", "Never")
		job := until(t, "through with two nodes", "stays",
			func(j *v1beta1.ImagePullJob) bool { return j.Status.Succeeded == 2 })
		if job.Status.Desired != 2 || job.Status.CompletionTime != nil {
			t.Errorf("%+v", job.Status)
		}
		must(t, bed.Nodes[2].Join(t.Context()))
		job = until(t, "through with three nodes", "stays", func(j *v1beta1.ImagePullJob) bool {
			return j.Status.Succeeded == 3 && reason(j) == "UpToDate"
		})
		if s := job.Status; s.Desired != 3 || s.Failed != 0 || s.CompletionTime != nil {
			t.Errorf("%+v", s)
		}
		pulledOnce(t, job, reference)
	})

	t.Run("one node at a time, with a controller that dies", func(t *testing.T) {
		if bed.Pid("n2-kubelet") == 0 {
			t.Fatal("the third node joins in the test before this one")
		}
		reference := create(t, "in-turn", "Always")
		most := int32(0)
		watch := func(so func(*v1beta1.ImagePullJob) bool) func(*v1beta1.ImagePullJob) bool {
			return func(j *v1beta1.ImagePullJob) bool {
				most = max(most, j.Status.Active)
				return so(j)
			}
		}
		until(t, "at the second node, or the third", "in-turn", watch(func(j *v1beta1.ImagePullJob) bool {
			if j.Status.CompletionTime != nil {
				t.Fatalf("too late, it has all been done: %+v", j.Status)
			}
			return j.Status.Succeeded >= 1 && j.Status.Active == 1
		}))
		must(t, bed.StopController(t.Context(), syscall.SIGKILL))
		must(t, bed.StartController(t.Context()))
		job := until(t, "completed", "in-turn",
			watch(func(j *v1beta1.ImagePullJob) bool { return j.Status.CompletionTime != nil }))
		if s := job.Status; s.Desired != 3 || s.Succeeded != 3 || reason(job) != "Succeeded" || most != 1 {
			t.Errorf("at most %d at once: %+v", most, s)
		}
		pulledOnce(t, job, reference)
	})
}
