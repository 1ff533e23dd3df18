// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package check

import (
	corev1 "k8s.io/api/core/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// Over returns true if a rollout has nothing left to do.
func Over(o *inplace.InPlaceRollout) bool {
	return o.Status.CompletionTime != nil && o.Status.ObservedRevision == evaluate.RevisionOf(o)
}

// SharedWith names the workload or pod that a rollout with these pods shares with another rollout;
// empty if there is none.
func SharedWith(own []*corev1.Pod, r, other *inplace.InPlaceRollout) string {
	if ref, theirs := r.Spec.Target.WorkloadRef, other.Spec.Target.WorkloadRef; ref != nil && theirs != nil {
		return sameWorkload(ref, theirs)
	}
	is := members(other.Spec.Target)
	for _, pod := range own {
		if pods.Active(pod) && is(pod) {
			return "pod " + pod.Name
		}
	}
	return ""
}
