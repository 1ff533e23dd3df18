// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// If several rollouts are about the same pods, one of them is at work at a time, even if their
// containers differ: a pod has one state annotation and one gate, and one rollout would undo the
// images of the other. The others wait until it has ended as a whole.
//
// The reconciler admits one rollout after the other, and remembers them: the cache may not show yet
// what an admitted rollout has written. After a restart of the controller the rollouts that had
// begun are first.

// admissions are the rollouts that were admitted.
type admissions struct {
	// choosing is held while one rollout is admitted.
	choosing sync.Mutex

	mu sync.Mutex
	// last counts the rollouts that were admitted, order is the place of each among them, by UID.
	last  uint64
	order map[types.UID]uint64
}

// admit admits a rollout with these pods, unless another rollout goes first. Then it returns that
// one, and what both are about.
func (a *admissions) admit(
	ctx context.Context, from client.Reader, rollout *inplace.InPlaceRollout, pods []*corev1.Pod,
) (*inplace.InPlaceRollout, string, error) {
	a.choosing.Lock()
	defer a.choosing.Unlock()
	var list inplace.InPlaceRolloutList
	if err := from.List(ctx, &list, client.InNamespace(rollout.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, "", err
	}
	var first *inplace.InPlaceRollout
	shared := ""
	for i := range list.Items {
		other := &list.Items[i]
		if other.UID == rollout.UID || !a.before(other, rollout) || !a.atWork(other) || first != nil &&
			!a.before(other, first) {
			continue
		}
		if what := check.SharedWith(pods, rollout, other); what != "" {
			first, shared = other, what
		}
	}
	if first == nil {
		a.add(rollout.UID)
	}
	return first, shared, nil
}

// add admits a rollout until it has ended.
func (a *admissions) add(uid types.UID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.order == nil {
		a.order = map[types.UID]uint64{}
	}
	if a.order[uid] == 0 {
		a.last++
		a.order[uid] = a.last
	}
}

// end is for a rollout that has ended: others may be admitted.
func (a *admissions) end(uid types.UID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.order, uid)
}

// placeOf returns the place of a rollout among those that were admitted; 0 if it was not.
func (a *admissions) placeOf(o *inplace.InPlaceRollout) uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.order[o.UID]
}

// atWork returns true if a rollout has pods to change, or will have some when it is admitted.
func (a *admissions) atWork(o *inplace.InPlaceRollout) bool {
	if o.DeletionTimestamp != nil || check.Over(o) {
		return false
	}
	c := meta.FindStatusCondition(o.Status.Conditions, inplace.ConditionProgressing)
	refused := c != nil && c.Reason == inplace.ReasonInvalidTarget && o.Status.ObservedGeneration == o.Generation
	return !refused || a.placeOf(o) != 0
}

// before returns true if the first rollout goes before the other: the one that was admitted first,
// then the one that had begun before the controller was started, then the older one, then by name.
func (a *admissions) before(one, other *inplace.InPlaceRollout) bool {
	x, y := a.placeOf(one), a.placeOf(other)
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
	m, since := begun(one)
	n, otherSince := begun(other)
	return cmp.Or(cmp.Compare(m, n), since.Compare(otherSince),
		one.CreationTimestamp.Compare(other.CreationTimestamp.Time), strings.Compare(one.Name, other.Name)) < 0
}

// queue has the rollout wait for another one: it releases its pods, and its status says for whom it
// waits.
func (p *pass) queue(ctx context.Context, first *inplace.InPlaceRollout, shared string) error {
	if undoing(p.rollout, &p.strategy) {
		p.goal = p.goal.Rollback(&p.rollout.Status, p.target.Workload != nil)
	}
	if _, err := p.release(ctx, "it waits for InPlaceRollout "+first.Name); err != nil {
		return err
	}
	text := fmt.Sprintf("waiting for InPlaceRollout %s, which is at work on %s: it goes on when that one has ended, "+
		"or is deleted", first.Name, shared)
	next := p.rollout.Status.DeepCopy()
	next.ObservedGeneration, next.Message = p.rollout.Generation, text
	setProgressing(next, true, inplace.ReasonQueued, text)
	p.teller.tell(corev1.EventTypeNormal, notice.EventQueued, text, string(first.UID))
	p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
	p.work.progressed = p.now // the deadline is for pods, not for others
	return p.writeStatus(ctx, next)
}
