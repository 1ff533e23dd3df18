// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"errors"
	"slices"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

// deleted releases the pins of a job that somebody has deleted after its end, as far as nodes
// answer. If the job was deleted because its time had passed, the pins stay: what was pulled is to
// be used.
func (r *Reconciler) deleted(job *v1beta1.ImagePullJob) {
	now := time.Now()
	if job.Status.CompletionTime == nil || job.Annotations[v1beta1.KeepPinsAnnotation] != "" ||
		!now.Before(spec.PinnedUntil(job, r.Limits)) {
		return
	}
	if over := expiry(job); !over.IsZero() && !now.Before(over) {
		return
	}
	leave, open := r.Gate.Enter()
	if !open {
		return
	}
	defer leave()
	r.workers.Do(func(ctx context.Context) {
		j, err := r.deletedState(ctx, job)
		if err != nil {
			r.Log.WithError(err).WithField("job", client.ObjectKeyFromObject(job).String()).
				Warn("the pins of a deleted job were not released: they end by themselves")
			return
		}
		j.close()
		j.cleanUpAll(true, opsv1.CancelCodeDeleted, func() {})
	})
}

// deletedState is the state of a deleted job of which nothing else is known: all nodes that the job
// may have chosen are to be cleaned up.
func (r *Reconciler) deletedState(ctx context.Context, job *v1beta1.ImagePullJob) (*jobState, error) {
	// The nodes that the job chose by pods may not be the ones that it chooses now: pods may be
	// gone.
	job = job.DeepCopy()
	if spec.PodSelector(job) != nil {
		job.Spec.PodSelector, job.Spec.Selector = nil, nil
	}
	s := spec.OfDeleted(job)
	var err error
	var why *apierror.SpecError
	if s.Nodes, err = spec.Match(ctx, r.Client, job, r.NodePort); err != nil && !errors.As(err, &why) {
		return nil, err
	}
	return newJobState(r, s, &memory{}, false, false), nil
}

// finalize lets a deleted job go. Before, it cancels the job's pulls and releases its pins on all
// nodes that answer within cleanUpTimeout.
func (p *pass) finalize(ctx context.Context) (time.Duration, error) {
	key := client.ObjectKeyFromObject(p.job)
	if !slices.Contains(p.job.Finalizers, v1beta1.PullFinalizer) {
		p.r.forget(key)
		return 0, p.removeFinalizers(ctx)
	}
	if p.memory.cleanedUp == nil && p.job.Status.StartTime != nil {
		if err := p.cleanUp(ctx); err != nil {
			return 0, err
		}
	}
	left := p.job.DeletionTimestamp.Add(cleanUpTimeout).Sub(p.now)
	if p.memory.cleanedUp != nil && left > 0 {
		select {
		case <-p.memory.cleanedUp:
		default:
			return left, nil
		}
	}
	p.r.forget(key)
	return 0, p.removeFinalizers(ctx)
}

// cleanUp begins to tell the nodes of a deleted job.
func (p *pass) cleanUp(ctx context.Context) error {
	if p.memory.state == nil {
		var err error
		if p.memory.state, err = p.r.deletedState(ctx, p.job); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	p.memory.cleanedUp = done
	j := p.memory.state
	j.close()
	count := j.cleanUpAll(true, opsv1.CancelCodeDeleted, func() {
		close(done)
		p.r.tracker.Wake(j.request)
	})
	if count == 0 {
		close(done)
		return nil
	}
	p.log.WithField("nodes", count).Info("job deleted: cancelling its pulls and releasing its pins")
	return nil
}

// removeFinalizers takes our finalizer off, and the one that OpenKruise may have left.
func (p *pass) removeFinalizers(ctx context.Context) error {
	before := p.job.DeepCopy()
	p.job.Finalizers = slices.DeleteFunc(p.job.Finalizers, func(f string) bool {
		return f == v1beta1.PullFinalizer || f == v1beta1.DeletionProtectionFinalizer
	})
	return p.patch(ctx, before)
}
