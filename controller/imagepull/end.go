// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
)

// complete ends a job.
func (p *pass) complete(ctx context.Context, next *v1beta1.ImagePullJobStatus, late bool) (time.Duration, error) {
	j := p.memory.state
	reason := report.End(next, late, p.now)
	if late {
		report.SetLateFailures(next, j.table.nodes.lateFailures())
	}
	if err := p.writeStatus(ctx, next); err != nil {
		return 0, err
	}
	j.writeEvents(p.r.Recorder, p.job)
	j.close()
	if late {
		j.cleanUpAll(false, opsv1.CancelCodeDeadline, func() {})
	}
	p.memory.state = nil
	message := meta.FindStatusCondition(next.Conditions, v1beta1.ConditionComplete).Message
	kind, what := corev1.EventTypeNormal, report.EventCompleted
	if meta.IsStatusConditionFalse(next.Conditions, v1beta1.ConditionSucceeded) {
		kind, what = corev1.EventTypeWarning, eventIncomplete
	}
	p.event(kind, what, message)
	p.r.Metrics.completed(reason)
	p.log.WithFields(logrus.Fields{"nodes": next.Desired, "failed": next.Failed, "reason": reason}).
		Info("job completed")
	return p.ended(ctx)
}

// ended takes the finalizers off a job that has ended, and deletes the job when
// ttlSecondsAfterFinished has passed.
func (p *pass) ended(ctx context.Context) (time.Duration, error) {
	// If the controller were uninstalled, a finalizer would keep the job's namespace for ever, for
	// the sake of pins that end by themselves.
	if err := p.removeFinalizers(ctx); err != nil {
		return 0, err
	}
	if p.job.Status.ObservedWork != "" { // else it was another controller's
		next := p.job.Status.DeepCopy()
		next.ObservedGeneration = p.job.Generation // what was changed since does not begin it again
		if err := p.writeStatus(ctx, next); err != nil {
			return 0, err
		}
	}
	over := expiry(p.job)
	if over.IsZero() {
		return 0, nil
	}
	if wait := over.Sub(p.now); wait > 0 {
		return wait, nil
	}
	p.log.Info("deleting the job: ttlSecondsAfterFinished has passed")
	// A job that somebody has edited meanwhile may begin again.
	err := p.r.Client.Delete(ctx, p.job, client.Preconditions{UID: &p.job.UID, ResourceVersion: &p.job.ResourceVersion})
	if err == nil {
		p.r.Metrics.Wrote("job")
	}
	return 0, client.IgnoreNotFound(err)
}

// expiry is when ttlSecondsAfterFinished of a job that has ended passes; zero: never.
func expiry(job *v1beta1.ImagePullJob) time.Time {
	ttl := job.Spec.CompletionPolicy.TTLSecondsAfterFinished
	if ttl == nil {
		return time.Time{}
	}
	return job.Status.CompletionTime.Add(time.Duration(*ttl) * time.Second)
}
