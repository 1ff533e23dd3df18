// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nodeops has nodes do what the pods of a rollout need: prepare new images, commit the
// change of a pod, restart containers, and check what a tag names. Calls of nodes run in goroutines
// and wake the reconciler, which never waits for a node.
package nodeops

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

const (
	// pinFor is longer than any rollout takes. At its end the rollout releases the pins.
	pinFor = 7 * 24 * time.Hour
	// holdFor is how long a node keeps a prepared upgrade: a budget may hold the pod back.
	holdFor = time.Hour
	// retryInterval is the first wait between two calls of a node that fails. It doubles up to
	// retryIntervalMax.
	retryInterval    = 500 * time.Millisecond
	retryIntervalMax = 5 * time.Second
	// gaveWayInterval is how long to wait after a preparation gave way to a restart: the pod's
	// status may not show the new container at once.
	gaveWayInterval = 2 * time.Second
	// watchRenew is how long a stream may be without news. Then the node is asked again, to see
	// whether it is still there.
	watchRenew = time.Minute
	// prepareSlack is how long a node may be late with the message that a preparation has taken too
	// long.
	prepareSlack = 15 * time.Second
	// secretsFor is how long secrets count as fresh after they were read.
	secretsFor = 5 * time.Minute
)

// backOff returns the wait after a number of tries that came before the last one.
func backOff(tries int) time.Duration { return retry.Backoff(tries, retryInterval, retryIntervalMax) }

// retryable returns true if a preparation that ended for this reason is worth another try.
func retryable(reason string) bool {
	return opsv1.RetryablePreparation(reason) || reason == "Aborted" // a word of older nodes
}

// Prepare has the node of a pod prepare the change: check the tags, and pull the images.
func (s *Session) Prepare(ctx context.Context, i *Item) {
	w, m := s.State, i.Ops
	s.checkTags(ctx, i)
	if s.imagesReady(i) != evaluate.Unprepared {
		return
	}
	uid := s.upgradeUID(i)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.Upgrade != nil && m.Upgrade.uid == uid {
		return
	}
	if old := m.Upgrade; old != nil {
		s.Driver.abort(m.node, old, "something else is wanted of the pod")
		old.end()
	}
	t := &nodeOperation{uid: uid, begun: s.Now}
	m.Upgrade = t
	node, err := s.reach(ctx, i)
	if err != nil {
		if t.failed = s.unreachable(m, err); t.failed == nil {
			m.Upgrade = nil
		}
		return
	}
	if m.State != nil && m.State.Operation != uid && s.Now.Sub(m.State.Time.Time) >= s.Strategy.Deadline {
		s.AbortMarked(m, "something else is wanted of the pod, and kubelet has not come for this")
	}
	s.run(t, node, i.Pod.Name, (&preparation{
		d: s.Driver, w: w, t: t, node: node, item: i, request: s.prepareRequest(ctx, i, uid),
		change: s.Change(i, uid, nil),
	}).begin)
	s.Log.WithField("pod", i.Pod.Name).WithField("op", uid).Debug("preparing")
}

// reach returns the node of a pod, and remembers that the node is told something.
func (s *Session) reach(ctx context.Context, i *Item) (nodes.Node, error) {
	node, err := s.Driver.node(ctx, i.Pod)
	if err == nil {
		i.Ops.node, s.State.nodes[node.Name] = node, node
	}
	return node, err
}

// unreachable returns a failure once the node of a pod has been missing for too long. Until then
// the pod is looked at again: if the node was removed, its pods will be gone soon, too.
func (s *Session) unreachable(m *PodOps, err error) *evaluate.Failure {
	if m.lost.IsZero() {
		m.lost = s.Now
	}
	if s.Now.Sub(m.lost) < s.Strategy.Deadline {
		s.again(m, retryIntervalMax)
		return nil
	}
	return &evaluate.Failure{Reason: evaluate.FailUnreachable, Message: err.Error()}
}

// upgradeUID returns the UID of the node's operation that upgrades a pod.
func (s *Session) upgradeUID(i *Item) string {
	ids, _ := evaluate.RunningIDs(i.Pod, objects.SortedKeys(i.Status.Images))
	return evaluate.OperationUID("u", i.Goal, i.Pod, ids, i.Ops.round)
}

func (s *Session) prepareRequest(ctx context.Context, i *Item, uid string) *opsv1.PrepareUpgradeRequest {
	request := s.upgradeRequest(i, uid)
	for _, name := range objects.SortedKeys(i.Status.Images) {
		c := pods.Changeable(i.Pod, name)
		u := &opsv1.ContainerUpgrade{Name: name, Image: i.Status.Images[name], Order: opsv1.Order_ORDER_STOP_FIRST}
		if cs := pods.Status(i.Pod, name); cs != nil {
			u.ExpectedContainerId = cs.ContainerID
		}
		if c.StartupProbe != nil {
			u.HoldProbes = pods.HoldProbes(c, s.Driver.Carries(ctx, i.Pod))
		}
		if s.Strategy.StartFirst {
			u.Order, u.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, s.Strategy.BesideSeconds()
		}
		u.RunAsNonRoot, u.RunAsUser = pods.RunAs(i.Pod, c)
		request.Containers = append(request.Containers, u)
	}
	return request
}

// upgradeRequest returns a request without containers.
func (s *Session) upgradeRequest(i *Item, uid string) *opsv1.PrepareUpgradeRequest {
	owner := evaluate.OwnerOf(s.Rollout)
	return &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: podRefOf(i.Pod), Requester: owner, Owner: owner, PinFor: durationpb.New(pinFor),
		PrepareTimeout: durationpb.New(s.Strategy.Deadline), HoldTimeout: durationpb.New(holdFor),
	}
}

// Commit announces the patch of the pod to the node.
func (s *Session) Commit(i *Item) {
	w, t, node := s.State, i.Ops.Upgrade, i.Ops.node
	w.mu.Lock()
	if t.commitRequested {
		w.mu.Unlock()
		return
	}
	t.commitRequested = true
	w.mu.Unlock()
	answers := i.Ops.AnswersOf(w)
	images, change := answers.All(i.Status.Images), s.Change(i, t.uid, answers)
	s.Driver.Workers.Do(func(ctx context.Context) {
		if w.commitUntil(ctx, t, func(ctx context.Context) (*opsv1.Operation, error) {
			if err := s.Driver.recheck(ctx, i, change, answers); err != nil {
				return nil, err
			}
			request, err := s.Driver.commitRequest(ctx, w, i.Pod, change.Label, t.uid, images)
			if err != nil {
				return nil, err
			}
			return s.Driver.Nodes.CommitUpgrade(ctx, node, request)
		}, i.Pod.Name, s.Strategy.Deadline) {
			w.wake()
		}
	})
}

// commitUntil calls commit until the node has accepted it, or it is of no use any more. It returns
// false if the controller ends before that.
func (w *State) commitUntil(
	ctx context.Context, t *nodeOperation, commit func(context.Context) (*opsv1.Operation, error), pod string,
	deadline time.Duration,
) bool {
	var since time.Time
	for tries := 0; ; tries++ {
		op, err := commit(ctx)
		w.mu.Lock()
		over := t.over || t.op.GetFinishTime() != nil || ctx.Err() != nil
		if err == nil && !over && op.GetPhase() != t.op.GetPhase() &&
			t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED {
			t.op = op // unless the stream was quicker
		}
		w.mu.Unlock()
		if over {
			return true
		}
		if w.noteAPI(t, err); err == nil {
			return true
		}
		why := troubleOf(err)
		if !dryrun.IsAPIStatus(err) {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		} else if time.Since(since) >= deadline && !why.final && !why.stale {
			why.Failure, why.final = dryrun.TooLong(pod, deadline, err), true
		}
		if why.final || why.stale {
			w.mu.Lock()
			t.failed, t.stale = &why.Failure, why.stale
			w.mu.Unlock()
			return true
		}
		if !retry.Sleep(ctx, backOff(tries)) {
			return false
		}
	}
}

// abort tells a node to take back an upgrade. If the node cannot be reached, the upgrade ends there
// after holdFor. The caller holds the mutex of the state.
func (d *Driver) abort(node nodes.Node, t *nodeOperation, why string) {
	if t == nil || t.op == nil || t.op.GetFinishTime() != nil || t.op.GetKind() == opsv1.KindRestart {
		return
	}
	d.takeBack(node, t.uid, why)
}

// Pod returns what is known of a pod. If that is about another revision, the node is told to take
// back what it has prepared for it, unless the pod was changed for that.
func (s *Session) Pod(pod *corev1.Pod, revision string) *PodOps {
	m, dropped := s.State.pod(pod, revision)
	if dropped != nil && !m.Fresh.Stale(pod) && (m.State == nil || m.State.Operation != dropped.uid) {
		s.State.mu.Lock()
		defer s.State.mu.Unlock()
		s.Driver.abort(m.node, dropped, "something else is wanted of the pod")
	}
	return m
}

// Keep forgets all other pods: they do not belong to the rollout any more. Nodes are told to take
// back what they have prepared for them.
func (s *Session) Keep(pods map[types.UID]bool) {
	s.State.mu.Lock()
	for uid, m := range s.State.pods {
		if t := m.Upgrade; !pods[uid] && t != nil && (m.State == nil || m.State.Operation != t.uid) {
			s.Driver.abort(m.node, t, "the pod is not the rollout's any more")
		}
	}
	s.State.mu.Unlock()
	s.State.keep(pods)
}

// AbortMarked tells the node to take back the upgrade for which this rollout last changed the pod.
// If kubelet has not begun with it, the node would go on waiting for kubelet, and refuse other
// operations on the container.
func (s *Session) AbortMarked(m *PodOps, why string) {
	if m.State != nil && m.State.Rollout == s.Rollout.UID && m.State.Operation != "" && m.node.Name != "" {
		s.Driver.takeBack(m.node, m.State.Operation, why)
	}
}

// Follow follows the operation of a pod that was changed already.
func (s *Session) Follow(ctx context.Context, i *Item) {
	w, m, uid := s.State, i.Ops, i.Ops.State.Operation
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.Upgrade != nil && m.Upgrade.uid == uid {
		return
	}
	m.Upgrade.end()
	t := &nodeOperation{uid: uid}
	m.Upgrade = t
	node, err := s.reach(ctx, i)
	if err != nil {
		t.answered = true // there is nobody to ask
		return
	}
	s.listen(t, node, i.Pod.Name)
}

// listen follows an operation that was begun before. If the node does not know it, or not any more,
// it has ended.
func (s *Session) listen(t *nodeOperation, node nodes.Node, pod string) {
	s.run(t, node, pod, func(ctx context.Context) (*opsv1.Operation, error) {
		op, err := s.Driver.Nodes.GetOperation(ctx, node, t.uid)
		if nodes.NotFound(err) {
			return &opsv1.Operation{Uid: t.uid, FinishTime: timestamppb.New(s.Now), Phase: opsv1.Phase_PHASE_CANCELLED},
				nil
		}
		return op, err
	})
}

// Inquire asks the node whether it still restarts containers for another goal: of a rollout that
// has ended or was deleted, or of an earlier revision.
func (s *Session) Inquire(ctx context.Context, i *Item) {
	w, m := s.State, i.Ops
	uid := m.State.RestartUID(i.Pod)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.restart != nil && m.restart.uid == uid {
		return
	}
	m.restart.end()
	m.restart = &nodeOperation{uid: uid, inquires: true}
	node, err := s.Driver.node(ctx, i.Pod)
	if err != nil {
		m.restart.answered = true // there is nobody to ask
		*s.Wait = retry.Sooner(*s.Wait, requeue.StaleInterval)
		return
	}
	s.listen(m.restart, node, i.Pod.Name)
}

// Restart has the node restart the containers of a pod that keep their images.
func (s *Session) Restart(ctx context.Context, i *Item) {
	w, m := s.State, i.Ops
	w.mu.Lock()
	defer w.mu.Unlock()
	request := s.restartRequest(ctx, i)
	if m.restart != nil && m.restart.uid == request.GetUid() {
		return
	}
	m.restart.end()
	t := &nodeOperation{uid: request.GetUid()}
	m.restart = t
	node, err := s.reach(ctx, i)
	if err != nil {
		t.failed = &evaluate.Failure{Reason: evaluate.FailUnreachable, Message: err.Error()}
		return
	}
	s.run(t, node, i.Pod.Name, func(ctx context.Context) (*opsv1.Operation, error) {
		now, err := s.Driver.launch(ctx, w, i.Pod, "")
		if err != nil {
			return nil, err
		}
		for _, c := range request.GetContainers() {
			if c.PullPolicy, c.Environment, err = now.container(ctx, c.GetName(), ""); err != nil {
				return nil, err
			}
		}
		request.Credentials = now.credentials()
		op, err := s.Driver.Nodes.Restart(ctx, node, request)
		return s.Driver.orFind(ctx, node, request.GetUid(), op, err)
	})
}

func (s *Session) restartRequest(ctx context.Context, i *Item) *opsv1.RestartRequest {
	request := &opsv1.RestartRequest{Uid: i.Ops.State.RestartUID(i.Pod), Pod: podRefOf(i.Pod),
		Requester: evaluate.OwnerOf(s.Rollout)}
	for _, name := range objects.SortedKeys(i.Ops.State.Containers) {
		c := pods.Changeable(i.Pod, name)
		old := i.Ops.State.Containers[name]
		if c == nil || c.Image != old.Image || old.ID == "" {
			continue
		}
		want := &opsv1.ContainerRestart{Name: name, ExpectedContainerId: old.ID, GracePeriodSeconds: s.Strategy.Grace}
		want.RunAsNonRoot, want.RunAsUser = pods.RunAs(i.Pod, c)
		if c.StartupProbe != nil {
			want.HoldProbes = pods.HoldProbes(c, s.Driver.Carries(ctx, i.Pod))
		}
		if s.Strategy.StartFirst {
			want.Order, want.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, s.Strategy.BesideSeconds()
		}
		if c.Lifecycle != nil {
			// A hook that cannot be resolved is left out: kubelet could not run it either.
			want.PreStop, _ = pods.Hook(c, c.Lifecycle.PreStop, i.Pod.Status.PodIP)
			want.PostStart, _ = pods.Hook(c, c.Lifecycle.PostStart, i.Pod.Status.PodIP)
		}
		request.Containers = append(request.Containers, want)
	}
	return request
}

// Upgrade returns the UID of the operation that upgrades a pod as it has to be now, and its phase.
// The UID is empty if no node knows of it.
func (s *Session) Upgrade(i *Item) (uid string, phase opsv1.Phase) {
	s.State.mu.Lock()
	defer s.State.mu.Unlock()
	if t := i.Ops.Upgrade; t != nil && t.uid == s.upgradeUID(i) {
		return t.uid, t.op.GetPhase()
	}
	return "", 0
}

// AbortUpgrade tells the node of a pod to take back its upgrade.
func (s *Session) AbortUpgrade(m *PodOps, why string) {
	s.State.mu.Lock()
	defer s.State.mu.Unlock()
	s.Driver.abort(m.node, m.Upgrade, why)
}

// Withdraw tells the node of a pod to take back what it has prepared, unless the pod was changed
// for that.
func (s *Session) Withdraw(m *PodOps, why string) {
	s.State.mu.Lock()
	defer s.State.mu.Unlock()
	if t := m.Upgrade; t != nil && !t.over && (m.State == nil || m.State.Operation != t.uid) {
		s.Driver.abort(m.node, t, why)
		t.end()
		m.Upgrade = nil
		m.round++ // what was taken back stays so
	}
}
