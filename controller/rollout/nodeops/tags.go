// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// A container may have the image of the goal in its spec already, and run another one: the tag has
// moved. With imagePullPolicy Always kubelet resolves the tag whenever it starts the container, so
// a rollout resolves it, too. Before the pod is changed, the node pulls the image and says whether
// the tag names the image that runs. If not, the rollout restarts the container. The pod's spec
// stays, so kubelet has no part in that.

// tagUID returns the UID of the node's operation that checks the tag of a container.
func (w *State) tagUID(m *PodOps, pod *corev1.Pod, container string) string {
	ids, _ := evaluate.RunningIDs(pod, []string{container})
	return evaluate.OperationUID("t", evaluate.Goal{Rollout: w.uid, Revision: m.revision}, pod, ids, m.tagTries)
}

// tagsChecked is how far the node is with the tags.
func (s *Session) tagsChecked(i *Item) evaluate.Readiness {
	if len(i.Status.CheckTags) == 0 {
		return evaluate.Prepared
	}
	if s.Now.Before(i.Ops.retryAt) {
		return evaluate.Preparing
	}
	s.State.mu.Lock()
	defer s.State.mu.Unlock()
	for _, name := range i.Status.CheckTags {
		if t := i.Ops.Tags[name]; t == nil || t.uid != s.State.tagUID(i.Ops, i.Pod, name) {
			return evaluate.Unprepared
		}
	}
	return evaluate.Preparing
}

// checkTags asks the node what the tags of a pod's containers name.
func (s *Session) checkTags(ctx context.Context, i *Item) {
	w, m := s.State, i.Ops
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range i.Status.CheckTags {
		uid := w.tagUID(m, i.Pod, name)
		if t := m.Tags[name]; t != nil && t.uid == uid {
			continue
		}
		m.Tags[name].end()
		t := &nodeOperation{uid: uid, begun: s.Now}
		node, err := s.reach(ctx, i)
		if err != nil {
			if t.failed = s.unreachable(m, err); t.failed == nil {
				return
			}
		}
		if m.Tags == nil {
			m.Tags = map[string]*nodeOperation{}
		}
		m.Tags[name] = t
		if t.failed != nil {
			return
		}
		image, request := pods.Changeable(i.Pod, name).Image, s.upgradeRequest(i, uid)
		s.run(t, node, i.Pod.Name, func(ctx context.Context) (*opsv1.Operation, error) {
			now, err := s.Driver.launch(ctx, w, i.Pod, "")
			if err != nil {
				return nil, err
			}
			want := &opsv1.ContainerUpgrade{Name: name, Image: image, Order: opsv1.Order_ORDER_STOP_FIRST}
			if want.PullPolicy, want.Environment, err = now.container(ctx, name, image); err != nil {
				return nil, err
			}
			request.Credentials, request.Containers = now.credentials(), []*opsv1.ContainerUpgrade{want}
			op, err := s.Driver.Nodes.PrepareUpgrade(ctx, node, request)
			return s.Driver.orFind(ctx, node, uid, op, err)
		})
	}
}

// SettleTags evaluates what the node has said about tags.
func (s *Session) SettleTags(i *Item) {
	w, m := s.State, i.Ops
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range objects.SortedKeys(m.Tags) {
		t := m.Tags[name]
		if t.tag != evaluate.TagUnknown || t.over {
			continue
		}
		reason, again := evaluate.Culprit(t.op).GetReason(), false
		switch {
		case t.failed != nil:
			again = t.stale
		case t.op.GetFinishTime() == nil && t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED:
			// The node knows the container with another image than the pod has: kubelet is about to
			// replace it.
			s.Driver.abort(m.node, t, "the container has another image than the pod's spec")
			t.failed, again = &evaluate.Failure{Reason: evaluate.FailPreparation,
				Message: fmt.Sprintf("container %s: what runs on node %s is of another image than the pod's spec has",
					name, m.node.Name)}, true
		case t.op.GetFinishTime() == nil:
			if !s.overdue(t) {
				continue
			}
			s.Driver.abort(m.node, t, "it took too long")
			t.failed = &evaluate.Failure{Reason: evaluate.FailDeadline,
				Message: fmt.Sprintf("node %s has not pulled the image of container %s within %s", m.node.Name, name,
					s.Strategy.Deadline)}
		case reason == opsv1.ReasonImageUnchanged:
			t.tag = evaluate.TagSame
			continue
		case reason == opsv1.ReasonImageMoved:
			t.tag = evaluate.TagMoved
			continue
		default:
			t.failed, again = failureOf(t.op), retryable(reason)
		}
		if again && m.tagTries < roundsMax {
			m.tagTries++
			s.again(m, backOff(m.tagTries))
		}
	}
}
