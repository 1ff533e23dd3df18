// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// Ways to command a restart.
const (
	viaOps      = "ops"      // the admin socket
	viaRepeated = "repeated" // the same, with the command sent a second time
	viaPair     = "pair"     // two operations on the same slot at the same time
	viaRequest  = "recreate" // a ContainerRecreateRequest
	orderHeader = "cri-proxy.io/restart-order"
)

// minReady is what a successor must have run with StartFirst.
const minReady = time.Second

// tooManyFailures ends a run that makes no sense any more.
const tooManyFailures = 20

// restart is one commanded restart of one container.
type restart struct {
	slot  *slot
	via   string
	order opsv1.Order
	uid   string // of its operation
	// took is from the command to the operation's end.
	took time.Duration
	// op is how the operation ended, nil when that did not become known; err says what went wrong.
	op  *opsv1.ContainerOperation
	err error
	// silence is the longest time between two answers around the restart, failed how many requests
	// failed in it. Unknown for pairs.
	silence time.Duration
	failed  int
}

// restarter commands restarts of random pods, at most one worker on a pod.
type restarter struct {
	*soak
	until time.Time // zero: only the count ends it

	mu       sync.Mutex // guards all following fields
	rand     *rand.Rand
	idle     []*pod
	left     int // restarts to command; negative: only the time ends it
	sent     int
	finished int
	failures int
	uids     int
}

// take returns a random idle pod and what to do with it; nil when the run is over.
func (r *restarter) take() (*pod, *plan) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.left == 0 || r.failures >= tooManyFailures || (!r.until.IsZero() && !time.Now().Before(r.until)) {
		return nil, nil
	}
	i := r.rand.IntN(len(r.idle))
	p := r.idle[i]
	r.idle[i] = r.idle[len(r.idle)-1]
	r.idle = r.idle[:len(r.idle)-1]

	pl := &plan{slots: p.slots, order: opsv1.Order_ORDER_STOP_FIRST, via: viaOps}
	if len(p.slots) > 1 && r.rand.IntN(2) == 0 {
		n := r.rand.IntN(len(p.slots))
		pl.slots = p.slots[n : n+1]
	}
	if p.shared && r.rand.Float64() < r.o.startFirst {
		pl.order = opsv1.Order_ORDER_START_FIRST
	}
	switch x := r.rand.Float64(); {
	case x < r.o.requests:
		pl.via = viaRequest
	case x < r.o.requests+0.05:
		pl.via, pl.slots = viaPair, pl.slots[:1]
	case x < r.o.requests+0.10:
		pl.via = viaRepeated
	}
	if r.left > 0 {
		// The last ones must not be more than asked for.
		if pl.via == viaPair && r.left < 2 {
			pl.via = viaOps
		}
		pl.slots = pl.slots[:min(len(pl.slots), r.left)]
		r.left -= pl.restarts()
	}
	r.sent += pl.restarts()
	return p, pl
}

// plan is what to do with a pod next.
type plan struct {
	slots []*slot
	order opsv1.Order
	via   string
}

func (p *plan) restarts() int {
	if p.via == viaPair {
		return 2 * len(p.slots)
	}
	return len(p.slots)
}

func (r *restarter) giveBack(p *pod, done []*restart) {
	for _, d := range done {
		d.slot.mu.Lock()
		d.slot.restarts = append(d.slot.restarts, d)
		d.slot.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.idle = append(r.idle, p)
	r.finished += len(done)
	for _, d := range done {
		if d.err != nil {
			r.failures++
		}
	}
}

func (r *restarter) progress() (sent, finished, failures int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent, r.finished, r.failures
}

func (r *restarter) uid() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uids++
	return fmt.Sprintf("soak-%05d", r.uids)
}

// run returns when all restarts are over, also those that failed.
func (r *restarter) run(ctx context.Context) {
	var workers sync.WaitGroup
	for range r.o.parallel {
		workers.Go(func() {
			for ctx.Err() == nil {
				p, pl := r.take()
				if p == nil {
					return
				}
				r.giveBack(p, r.do(ctx, pl))
			}
		})
	}
	workers.Wait()
}

// do carries one plan out and returns its restarts.
func (r *restarter) do(ctx context.Context, pl *plan) []*restart {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	newest := make([]time.Time, len(pl.slots))
	for i, s := range pl.slots {
		newest[i] = s.client.open(pl.order == opsv1.Order_ORDER_START_FIRST)
	}
	var done []*restart
	switch pl.via {
	case viaPair:
		var both [2][]*restart
		var wg sync.WaitGroup
		for i := range both {
			wg.Go(func() { both[i] = r.viaOps(ctx, pl) })
		}
		wg.Wait()
		done = slices.Concat(both[0], both[1])
	case viaRequest:
		done = r.viaRequest(ctx, pl)
	default:
		done = r.viaOps(ctx, pl)
	}
	for i, s := range pl.slots {
		ok := true
		for _, d := range done {
			ok = ok && (d.slot != s || d.err == nil)
		}
		var err error
		if ok {
			err = s.client.await(ctx, latest(newest[i], s, done))
		}
		w := s.client.shut()
		for _, d := range done {
			if d.slot == s {
				d.silence, d.failed, d.err = w.longest, w.failed, errors.Join(d.err, err)
			}
		}
	}
	for _, d := range done {
		if d.err != nil {
			r.tell("restart of %s (%s, operation %s) went wrong: %v", d.slot, d.via, d.uid, d.err)
		}
	}
	return done
}

// latest returns a time that only the process of the slot's last restart began after: before is
// when the one began that ran before all of them. Between two restarts it is the middle of their
// starts.
func latest(before time.Time, s *slot, done []*restart) time.Time {
	var starts []time.Time
	for _, d := range done {
		if d.slot == s {
			starts = append(starts, d.op.GetStartTime().AsTime())
		}
	}
	slices.SortFunc(starts, time.Time.Compare)
	if n := len(starts); n > 1 {
		return starts[n-2].Add(starts[n-1].Sub(starts[n-2]) / 2)
	}
	return before
}

// viaOps runs one operation over the plan's slots on the admin socket.
func (r *restarter) viaOps(ctx context.Context, pl *plan) []*restart {
	req := &opsv1.RestartRequest{Uid: r.uid(), Requester: "soak",
		Pod: &opsv1.PodRef{Namespace: namespace, Name: pl.slots[0].pod.name, Uid: pl.slots[0].pod.uid}}
	done := make([]*restart, len(pl.slots))
	for i, s := range pl.slots {
		c := &opsv1.ContainerRestart{Name: s.container, Order: pl.order}
		if pl.order == opsv1.Order_ORDER_START_FIRST {
			c.MinReadySeconds = int32(minReady / time.Second)
		}
		if pl.via != viaPair {
			c.ExpectedContainerId = s.incumbent()
		}
		req.Containers = append(req.Containers, c)
		done[i] = &restart{slot: s, via: pl.via, order: pl.order, uid: req.GetUid()}
	}
	began := time.Now()
	_, err := r.ops.Restart(ctx, req)
	if err == nil && pl.via == viaRepeated {
		_, err = r.ops.Restart(ctx, req)
	}
	var op *opsv1.Operation
	if err == nil {
		op, err = r.finish(ctx, req.GetUid())
	}
	for _, d := range done {
		d.took, d.op, d.err = time.Since(began), containerOf(op, d.slot.container), err
		if err == nil {
			d.err = succeeded(d.op)
		}
	}
	return done
}

// finish waits until the operation has finished.
func (s *soak) finish(ctx context.Context, uid string) (*opsv1.Operation, error) {
	stream, err := s.ops.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid})
	if err != nil {
		return nil, err
	}
	for {
		op, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("its end did not become known: %w", err)
		}
		if op.GetFinishTime() != nil {
			return op, nil
		}
	}
}

// viaRequest creates a ContainerRecreateRequest and waits for its end.
func (r *restarter) viaRequest(ctx context.Context, pl *plan) []*restart {
	crr := &appsv1alpha1.ContainerRecreateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: r.uid(),
		Annotations: map[string]string{}}}
	crr.Spec.PodName = pl.slots[0].pod.name
	ttl := int32(60)
	crr.Spec.TTLSecondsAfterFinished = &ttl
	if pl.order == opsv1.Order_ORDER_START_FIRST {
		crr.Annotations[orderHeader] = "StartFirst"
		crr.Spec.Strategy = &appsv1alpha1.ContainerRecreateRequestStrategy{
			MinStartedSeconds: int32(minReady / time.Second)}
	}
	done := make([]*restart, len(pl.slots))
	for i, s := range pl.slots {
		crr.Spec.Containers = append(crr.Spec.Containers,
			appsv1alpha1.ContainerRecreateRequestContainer{Name: s.container})
		done[i] = &restart{slot: s, via: pl.via, order: pl.order, uid: crr.Name}
	}
	err := r.shown(ctx, pl.slots)
	began := time.Now()
	if err == nil {
		err = r.api.Create(ctx, crr)
	}
	if err == nil {
		err = r.complete(ctx, crr)
	}
	for _, d := range done {
		d.took, d.err = time.Since(began), err
		if err != nil {
			continue
		}
		d.uid = string(crr.UID) + "." + d.slot.container
		op, err := r.ops.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: d.uid})
		if err != nil {
			d.err = fmt.Errorf("the request is completed: %w", err)
			continue
		}
		d.op = containerOf(op, d.slot.container)
		d.err = succeeded(d.op)
	}
	return done
}

// shown waits until kubelet has told the API server of the containers that run: a request means
// those that it finds there, and has nothing to do for one that has been replaced since.
func (s *soak) shown(ctx context.Context, slots []*slot) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		p := &corev1.Pod{}
		if err := s.api.Get(ctx, kube.ObjectKey{Namespace: namespace, Name: slots[0].pod.name}, p); err != nil {
			return err
		}
		behind := ""
		for _, c := range p.Status.ContainerStatuses {
			for _, sl := range slots {
				if c.Name == sl.container && bareID(c.ContainerID) != sl.incumbent() {
					behind = fmt.Sprintf("kubelet reports %.12s for %s, where %.12s runs", bareID(c.ContainerID), sl,
						sl.incumbent())
				}
			}
		}
		if behind == "" {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", behind, ctx.Err())
		}
	}
}

// complete waits until the request is completed and each of its containers has succeeded.
func (s *soak) complete(ctx context.Context, crr *appsv1alpha1.ContainerRecreateRequest) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for crr.Status.Phase != appsv1alpha1.ContainerRecreateRequestCompleted {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("request %s is %q: %w", crr.Name, crr.Status.Phase, ctx.Err())
		}
		if err := s.api.Get(ctx, kube.ObjectKeyFromObject(crr), crr); err != nil {
			return err
		}
	}
	if n := len(crr.Status.ContainerRecreateStates); n != len(crr.Spec.Containers) {
		return fmt.Errorf("request %s completed with %d states: %s", crr.Name, n, crr.Status.Message)
	}
	for _, st := range crr.Status.ContainerRecreateStates {
		if st.Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
			return fmt.Errorf("request %s: container %s is %s: %s %s", crr.Name, st.Name, st.Phase, st.Message,
				crr.Status.Message)
		}
	}
	return nil
}

// incumbent returns the ID of the container that runs after the restarts so far.
func (s *slot) incumbent() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	newest, id := uint32(0), s.first
	for _, r := range s.restarts {
		if r.op.GetAttempt() > newest && r.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
			newest, id = r.op.GetAttempt(), r.op.GetSuccessorId()
		}
	}
	return id
}

func containerOf(op *opsv1.Operation, name string) *opsv1.ContainerOperation {
	for _, c := range op.GetContainers() {
		if c.GetName() == name {
			return c
		}
	}
	return nil
}

// succeeded returns what an operation's part says of a failure.
func succeeded(c *opsv1.ContainerOperation) error {
	switch {
	case c == nil:
		return errors.New("the operation does not name the container")
	case c.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED:
		return fmt.Errorf("%s, %s: %s", c.GetPhase(), c.GetReason(), c.GetMessage())
	}
	return nil
}
