// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// Of rollouts that are about the same pods, one is at work at a time, whatever their containers are: a pod has one mark and one gate, and
// the images of one would be undone by the other. The others wait for its end, as a whole.
//
// Who is let in is decided here, one at a time, and remembered: the cache need not show yet what was written of the one that was let in. It
// shows that one itself, which was read from there. After a restart those that had begun are first.

// takeTurn lets the rollout in, unless another one goes before it: then it returns that one, and what both are about.
func (r *Reconciler) takeTurn(ctx context.Context, p *pass) (*inplace.InPlaceRollout, string, error) {
	r.turns.Lock()
	defer r.turns.Unlock()
	var list inplace.InPlaceRolloutList
	if err := r.Client.List(ctx, &list, client.InNamespace(p.rollout.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, "", err
	}
	var first *inplace.InPlaceRollout
	shared := ""
	for i := range list.Items {
		other := &list.Items[i]
		if other.UID == p.rollout.UID || !r.before(other, p.rollout) || !r.atWork(other) || first != nil && !r.before(other, first) {
			continue
		}
		if what := p.target.sharedWith(p.rollout, other); what != "" {
			first, shared = other, what
		}
	}
	if first == nil {
		r.letIn(p.work)
	}
	return first, shared, nil
}

// letIn gives a rollout its turn, which it keeps until it has ended.
func (r *Reconciler) letIn(w *work) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.turn == 0 {
		r.lastTurn++
		w.turn = r.lastTurn
	}
}

// endTurn lets others in.
func (r *Reconciler) endTurn(w *work) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w.turn = 0
}

// turnOf is when a rollout was let in; 0 when it was not.
func (r *Reconciler) turnOf(o *inplace.InPlaceRollout) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.works[client.ObjectKeyFromObject(o)]; w != nil && w.uid == o.UID {
		return w.turn
	}
	return 0
}

// atWork says that a rollout has pods to change, or will have some when its turn comes.
func (r *Reconciler) atWork(o *inplace.InPlaceRollout) bool {
	if o.DeletionTimestamp != nil || over(o) {
		return false
	}
	c := meta.FindStatusCondition(o.Status.Conditions, inplace.ConditionProgressing)
	refused := c != nil && c.Reason == inplace.ReasonInvalidTarget && o.Status.ObservedGeneration == o.Generation
	return !refused || r.turnOf(o) != 0
}

// over says that a rollout has nothing left to do.
func over(o *inplace.InPlaceRollout) bool {
	return o.Status.CompletionTime != nil && o.Status.ObservedRevision == revisionOf(o)
}

// before says which of two goes first: the one that was let in first, then the one that had begun before the controller was started,
// then the older one, then by name.
func (r *Reconciler) before(a, b *inplace.InPlaceRollout) bool {
	x, y := r.turnOf(a), r.turnOf(b)
	switch {
	case x != 0 && y != 0:
		return x < y
	case x != 0 || y != 0:
		return x != 0
	}
	begun := func(o *inplace.InPlaceRollout) (int, time.Time) {
		if o.Status.StartTime == nil || o.Status.CompletionTime != nil {
			return 1, time.Time{}
		}
		return 0, o.Status.StartTime.Time
	}
	m, since := begun(a)
	n, other := begun(b)
	return cmp.Or(cmp.Compare(m, n), since.Compare(other), a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name)) < 0
}

// sharedWith names what the target has in common with that of another rollout; empty when there is nothing.
func (t *target) sharedWith(r, other *inplace.InPlaceRollout) string {
	if ref, theirs := r.Spec.Target.WorkloadRef, other.Spec.Target.WorkloadRef; ref != nil && theirs != nil {
		return sameWorkload(ref, theirs)
	}
	is := members(other.Spec.Target)
	for _, pod := range t.pods {
		if active(pod) && is(pod) {
			return "pod " + pod.Name
		}
	}
	return ""
}

// queue lets the rollout wait for another one: what it has taken up is taken back, and its status says for whom it waits.
func (p *pass) queue(ctx context.Context, first *inplace.InPlaceRollout, shared string) error {
	if p.undoing() {
		p.goal = p.goal.undoing(&p.rollout.Status, p.target.workload != nil)
	}
	if _, err := p.stepBack(ctx, "it waits for InPlaceRollout "+first.Name); err != nil {
		return err
	}
	text := fmt.Sprintf("waiting for InPlaceRollout %s, which is at work on %s: it goes on when that one has ended, or is deleted", first.Name, shared)
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, text
	p.stand(next, true, inplace.ReasonQueued, text)
	p.tell(corev1.EventTypeNormal, eventQueued, text, string(first.UID))
	p.wait = sooner(p.wait, blockedPause)
	p.work.progressed = p.now // the deadline is for pods, not for others
	return p.writeStatus(ctx, next)
}
