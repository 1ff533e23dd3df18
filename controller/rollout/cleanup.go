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
)

// cleanup releases the pins of a rollout that has ended, removes its finalizer, and deletes the rollout when ttlSecondsAfterFinished has
// passed.
func (p *pass) retire(ctx context.Context) error {
	if slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		if p.work.released == nil {
			p.release(ctx)
		}
		select {
		case <-p.work.released:
		default:
			return nil // it wakes
		}
		if err := p.writer.removeFinalizer(ctx); err != nil {
			return err
		}
	}
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration = p.rollout.Generation // what was changed since does not begin it again
	if err := p.writer.status(ctx, next); err != nil {
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
		p.r.Metrics.wrote("rollout")
	}
	return client.IgnoreNotFound(err)
}

// releasePins begins to tell the nodes that the rollout has ended.
func (p *pass) release(ctx context.Context) {
	var pods []*corev1.Pod
	if t, err := p.env.find(ctx); err == nil {
		pods = t.pods
	}
	p.work.released = p.ops.release(ctx, pods)
}

// finalize ends a rollout that is being deleted: nodes take back what they have prepared, the pods go back into service, the Deployment
// goes on, and the pins are released.
func (p *pass) finalize(ctx context.Context) error {
	key := client.ObjectKeyFromObject(p.rollout)
	if !slices.Contains(p.rollout.Finalizers, inplace.RolloutFinalizer) {
		p.r.forget(key)
		return nil
	}
	if p.work.released == nil {
		settled, err := p.undoTraces(ctx)
		if err != nil {
			return err
		}
		if !settled {
			p.wait = sooner(p.wait, blockedPause)
			return nil
		}
		if err := p.env.giveBack(ctx, p.target); err != nil {
			return err
		}
		p.release(ctx)
	}
	select {
	case <-p.work.released:
	default:
		return nil
	}
	if err := p.writer.removeFinalizer(ctx); err != nil {
		return err
	}
	p.r.forget(key)
	return nil
}

// undoTraces releases the pods and the workload of a rollout that has not ended. It returns true when all is done.
func (p *pass) undoTraces(ctx context.Context) (bool, error) {
	var why *specError
	var err error
	if p.target, err = p.env.find(ctx); errors.As(err, &why) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	p.goal = goalOf(p.rollout)
	return p.stepBack(ctx, "the InPlaceRollout was deleted")
}

// release lets the pods and the workload go: nodes take back what they have prepared, the pods go back into service, and the workload's
// own controller goes on. It returns true when all is done.
func (p *pass) stepBack(ctx context.Context, why string) (bool, error) {
	done := true
	there := map[types.UID]bool{}
	for _, pod := range p.target.pods {
		there[pod.UID] = true
		m := p.ops.memberOf(pod, p.goal.revision)
		p.ops.withdraw(m, why)
		m.turn = false
		if !active(pod) {
			continue
		}
		if m.stale(pod) {
			done = false // the gate may have been closed by what the cache does not show yet
			continue
		}
		if shut, _ := shutBy(pod); shut != p.rollout.UID {
			continue
		}
		if err := p.setGates(ctx, &item{podRef: podRef{pod: pod}, m: m}, ""); err != nil {
			return false, client.IgnoreNotFound(err)
		}
	}
	p.ops.keep(there)
	if w := p.target.workload; w != nil {
		settled, err := w.settle(ctx)
		return done && settled, err
	}
	return done, nil
}

// supersede ends the rollout because somebody wants something newer. First it writes that into the status, then it releases the pods.
func (p *pass) supersede(ctx context.Context, text string) error {
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, text
	stand(next, false, inplace.ReasonSuperseded, text)
	if p.goal.undo {
		setCondition(next, inplace.ConditionDegraded, true, inplace.ReasonSuperseded, text)
	} else {
		setCondition(next, inplace.ConditionDegraded, false, inplace.ReasonAsExpected, "")
	}
	if newer(p.rollout) == "" {
		p.wait = stalePause
		return p.writer.status(ctx, next)
	}
	done, err := p.stepBack(ctx, "the InPlaceRollout is superseded")
	if err != nil {
		return err
	}
	if !done {
		p.wait = sooner(p.wait, blockedPause)
		return nil
	}
	now := metav1.NewTime(p.now)
	next.CompletionTime = &now
	return p.end(ctx, next)
}
