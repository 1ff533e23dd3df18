// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// QueueAllowance is how long a pull may wait on its node for kubelet's pulls and for those of other
// jobs, of which a list has up to 255.
const QueueAllowance = 6 * time.Hour

// WorkBound is how long all attempts of a pull may take, with the waits between them.
func WorkBound(r *opsv1.PullRequest) time.Duration {
	bound := time.Duration(r.GetMaxAttempts()) * r.GetAttemptTimeout().AsDuration()
	for i := range r.GetMaxAttempts() - 1 {
		bound += opsv1.PullBackOff(i + 1)
	}
	return bound
}

// deadlineOf is how long after the command a node has to give up. All nodes get the same, since a
// command must not change. The deadline keeps a node from going on for ever when there is no
// controller any more.
func deadlineOf(job *v1beta1.ImagePullJob, r *opsv1.PullRequest) *durationpb.Duration {
	d := min(WorkBound(r)+QueueAllowance, maxSpan)
	p := job.Spec.CompletionPolicy
	if s := p.ActiveDeadlineSeconds; p.Type != v1beta1.Never && s != nil && *s > 0 {
		d = min(d, time.Duration(min(*s, int64(maxSpan/time.Second)))*time.Second)
	}
	return durationpb.New(d)
}
