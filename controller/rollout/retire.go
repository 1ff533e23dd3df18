// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const (
	// releasePatience is how long nodes are tried that do not answer. Their pins expire.
	releasePatience = 2 * time.Minute
	// releaseWidth is how many nodes are told at once.
	releaseWidth = 32
)

// retire lets go of a rollout that has ended: its pins are released, its finalizer is taken off, and it is deleted when its time
// has come.
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
		if err := p.letGo(ctx); err != nil {
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
		p.r.Metrics.wrote("rollout")
	}
	return client.IgnoreNotFound(err)
}

// letGo takes the finalizer off.
func (p *pass) letGo(ctx context.Context) error {
	before := p.rollout.DeepCopy()
	p.rollout.Finalizers = slices.DeleteFunc(p.rollout.Finalizers, func(f string) bool { return f == inplace.RolloutFinalizer })
	return p.patch(ctx, before)
}

// release begins to tell the nodes that the rollout has ended: those of its pods, and those that were told anything.
func (p *pass) release(ctx context.Context) {
	done := make(chan struct{})
	p.work.released = done
	if t, err := p.find(ctx); err == nil {
		for _, pod := range t.pods {
			if pod.Spec.NodeName == "" || p.work.nodes[pod.Spec.NodeName].Name != "" {
				continue
			}
			if node, err := p.node(ctx, pod); err == nil {
				p.work.nodes[node.Name] = node
			}
		}
	}
	var left []nodes.Node
	for _, name := range sortedKeys(p.work.nodes) {
		left = append(left, p.work.nodes[name])
	}
	owner, wake := ownerOf(p.rollout), p.work.wake
	p.work.close()
	if len(left) == 0 {
		close(done)
		return
	}
	p.r.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, releasePatience)
		defer cancel()
		for wait := tellPause; ; wait = min(2*wait, tellPauseMax) {
			left = p.r.releaseOnce(ctx, left, owner)
			if len(left) == 0 || !pause(ctx, wait) {
				break
			}
		}
		if len(left) > 0 {
			p.log.WithField("nodes", len(left)).Warn("nodes could not be told that the rollout has ended: what they pin expires")
		}
		close(done)
		wake()
	})
}

// releaseOnce tries each node once and returns those that are left.
func (r *Reconciler) releaseOnce(ctx context.Context, told []nodes.Node, owner string) []nodes.Node {
	var mu sync.Mutex
	var left []nodes.Node
	var g errgroup.Group
	g.SetLimit(releaseWidth)
	for _, n := range told {
		g.Go(func() error {
			if _, err := r.Nodes.ReleasePins(ctx, n, owner, ""); err != nil && !troubleOf(err).final {
				mu.Lock()
				defer mu.Unlock()
				left = append(left, n)
			}
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return left
}

// finalize lets a deleted rollout go: what is prepared is taken back, its pods go back into service, its Deployment goes on, its pins
// are released.
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
		if err := p.giveBack(ctx); err != nil {
			return err
		}
		p.release(ctx)
	}
	select {
	case <-p.work.released:
	default:
		return nil
	}
	if err := p.letGo(ctx); err != nil {
		return err
	}
	p.r.forget(key)
	return nil
}

// undoTraces takes back what a rollout in the middle has left. It says whether all is done.
func (p *pass) undoTraces(ctx context.Context) (bool, error) {
	var why *specError
	var err error
	if p.target, err = p.find(ctx); errors.As(err, &why) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	p.goal = goalOf(p.rollout)
	return p.stepBack(ctx, "the InPlaceRollout was deleted")
}

// stepBack leaves the pods alone: what nodes have made ready for them is taken back, they go back into service, and their workload's
// controller goes on. It says whether all is done.
func (p *pass) stepBack(ctx context.Context, why string) (bool, error) {
	done := true
	there := map[types.UID]bool{}
	for _, pod := range p.target.pods {
		there[pod.UID] = true
		m := p.memberOf(pod)
		p.work.mu.Lock()
		if t := m.visit; t != nil && !t.over && (m.mark == nil || m.mark.Operation != t.uid) {
			p.abort(m.node, t, why)
			t.end()
			m.visit = nil
			m.round++ // what was taken back stays so
		}
		p.work.mu.Unlock()
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
		if err := p.setGates(ctx, &item{pod: pod, m: m}, ""); err != nil {
			return false, client.IgnoreNotFound(err)
		}
	}
	p.keep(there)
	if w := p.target.workload; w != nil {
		settled, err := w.settle(ctx)
		return done && settled, err
	}
	return done, nil
}
