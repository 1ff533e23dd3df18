// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// cleanup releases the pins of a rollout that has ended, removes its finalizer, and deletes the
// rollout when ttlSecondsAfterFinished has passed.
func (p *pass) cleanup(ctx context.Context) error {
	if slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		if done, err := p.removeFinalizer(ctx); !done || err != nil {
			return err
		}
	}
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration = p.rollout.Generation // what was changed since does not begin it again
	if err := p.writeStatus(ctx, next); err != nil {
		return err
	}
	if p.rollout.Spec.TTLSecondsAfterFinished == nil {
		return nil
	}
	ttl := time.Duration(*p.rollout.Spec.TTLSecondsAfterFinished) * time.Second
	if left := p.rollout.Status.CompletionTime.Add(ttl).Sub(p.now); left > 0 {
		p.wait = left
		return nil
	}
	p.log.Info("deleting the rollout: ttlSecondsAfterFinished has passed")
	err := p.r.Client.Delete(ctx, p.rollout, client.Preconditions{UID: &p.rollout.UID})
	if err == nil {
		p.r.Metrics.Wrote("rollout")
	}
	return client.IgnoreNotFound(err)
}

// removeFinalizer takes the finalizer off once the nodes have been told that the rollout has ended.
// It returns true when both is done.
func (p *pass) removeFinalizer(ctx context.Context) (bool, error) {
	if p.work.released == nil {
		var pods []*corev1.Pod
		if t, err := p.env.Find(ctx); err == nil {
			pods = t.Pods
		}
		p.work.released = p.ops.Release(ctx, pods)
	}
	select {
	case <-p.work.released:
	default:
		return false, nil // the release wakes the reconciler
	}
	before := p.rollout.DeepCopy()
	p.rollout.Finalizers = slices.DeleteFunc(p.rollout.Finalizers,
		func(f string) bool { return f == inplace.RolloutFinalizer })
	err := p.writer.Patch(ctx, p.rollout, before)
	return err == nil, err
}

// finalize ends a rollout that is being deleted: nodes take back what they have prepared, the pods
// go back into service, the Deployment goes on, and the pins are released.
func (p *pass) finalize(ctx context.Context) error {
	key := client.ObjectKeyFromObject(p.rollout)
	if !slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		p.r.forget(key)
		return nil
	}
	if p.work.released == nil {
		var why *apierror.SpecError
		var err error
		settled := true
		if p.target, err = p.env.Find(ctx); err == nil {
			p.goal = evaluate.GoalOf(p.rollout)
			settled, err = p.release(ctx, "the InPlaceRollout was deleted")
		} else if errors.As(err, &why) {
			err = nil
		}
		if err != nil {
			return err
		}
		if !settled {
			p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
			return nil
		}
		if err := p.env.GiveBack(ctx, p.target); err != nil {
			return err
		}
	}
	done, err := p.removeFinalizer(ctx)
	if done {
		p.r.forget(key)
	}
	return err
}

// release lets the pods and the workload go: nodes take back what they have prepared, the pods go
// back into service, and the workload's own controller goes on. It returns true when all is done.
func (p *pass) release(ctx context.Context, why string) (bool, error) {
	done := true
	there := map[types.UID]bool{}
	for _, pod := range p.target.Pods {
		there[pod.UID] = true
		m := p.ops.Pod(pod, p.goal.Revision)
		p.ops.Withdraw(m, why)
		m.Updating = false
		if !pods.Active(pod) {
			continue
		}
		if m.Fresh.Stale(pod) {
			done = false // the gate may have been closed by what the cache does not show yet
			continue
		}
		if shut, _ := evaluate.OutOfServiceBy(pod); shut != p.rollout.UID {
			continue
		}
		if err := p.pods.setGates(ctx, m, pod, ""); err != nil {
			return false, client.IgnoreNotFound(err)
		}
	}
	p.ops.Keep(there)
	if w := p.target.Workload; w != nil {
		settled, err := w.Resume(ctx)
		return done && settled, err
	}
	return done, nil
}

// supersede ends the rollout because somebody wants something newer. First it writes that into the
// status, then it releases the pods.
func (p *pass) supersede(ctx context.Context, text string) error {
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, text
	setProgressing(next, false, inplace.ReasonSuperseded, text)
	if p.goal.Undo {
		notice.SetCondition(next, inplace.ConditionDegraded, true, inplace.ReasonSuperseded, text)
	} else {
		notice.SetCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	if workload.Newer(p.rollout) == "" {
		p.wait = requeue.StaleInterval
		return p.writeStatus(ctx, next)
	}
	done, err := p.release(ctx, "the InPlaceRollout is superseded")
	if err != nil {
		return err
	}
	if !done {
		p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
		return nil
	}
	now := metav1.NewTime(p.now)
	next.CompletionTime = &now
	return p.end(ctx, next)
}
