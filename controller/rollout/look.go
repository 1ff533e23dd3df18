// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// A container may have the image of the goal in its spec already, and run another one: the tag has moved. With imagePullPolicy Always kubelet
// resolves the tag whenever it starts the container, so a rollout resolves it, too. Before the pod is changed, the node pulls the image and says
// whether the tag names the image that runs. If not, the rollout restarts the container. The pod's spec stays, so kubelet has no part in that.

// reasonMoved is the node's reason for a tag that names another image than the one that runs.
const reasonMoved = "ImageMoved"

// tagUID returns the UID of the node's operation that checks the tag of a container.
func (w *state) lookUID(m *member, pod *corev1.Pod, container string) string {
	ids, _ := idsOf(pod, []string{container})
	return operationUID("t", goal{rollout: w.uid, revision: m.revision}, pod, ids, m.lookTries)
}

// tagsChecked is how far the node is with the tags.
func (s *session) looking(i *item) readiness {
	if len(i.verdict.looks) == 0 {
		return prepared
	}
	if s.now.Before(i.m.retryAt) {
		return preparing
	}
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	for _, name := range i.verdict.looks {
		if t := i.m.looks[name]; t == nil || t.uid != s.state.lookUID(i.m, i.pod, name) {
			return unprepared
		}
	}
	return preparing
}

// checkTags asks the node what the tags of a pod's containers name.
func (s *session) look(ctx context.Context, i *item) {
	w, m := s.state, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range i.verdict.looks {
		uid := w.lookUID(m, i.pod, name)
		if t := m.looks[name]; t != nil && t.uid == uid {
			continue
		}
		m.looks[name].end()
		t := &talk{uid: uid, begun: s.now}
		node, err := s.driver.node(ctx, i.pod)
		if err != nil {
			// A node that is taken away takes its pods with it, soon.
			if m.lost.IsZero() {
				m.lost = s.now
			}
			if s.now.Sub(m.lost) < s.strategy.deadline {
				s.again(m, tellPauseMax)
				return
			}
			t.failed = &failure{failUnreachable, err.Error()}
		}
		if m.looks == nil {
			m.looks = map[string]*talk{}
		}
		m.looks[name] = t
		if t.failed != nil {
			return
		}
		m.node, w.nodes[node.Name] = node, node
		container, _ := containerOf(i.pod, name)
		request := s.upgradeRequest(i, uid)
		c := &conversation{d: s.driver, w: w, t: t, node: node, pod: i.pod.Name, patience: s.strategy.deadline}
		c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
			now, err := s.driver.launch(ctx, w, i.pod, "")
			if err != nil {
				return nil, err
			}
			want := &opsv1.ContainerUpgrade{Name: name, Image: container.Image, Order: opsv1.Order_ORDER_STOP_FIRST}
			if want.PullPolicy, want.Environment, err = now.container(ctx, name); err != nil {
				return nil, err
			}
			request.Credentials, request.Containers = now.ring.For(pullsecrets.Pulled(want.Image, want.PullPolicy, want.Environment)...), []*opsv1.ContainerUpgrade{want}
			op, err := s.driver.nodes.PrepareUpgrade(ctx, node, request)
			if code(err) == codes.AlreadyExists {
				op, err = s.driver.nodes.GetOperation(ctx, node, uid)
			}
			return op, err
		}
		c.start()
	}
}

// SettleTags evaluates what the node has said about tags.
func (s *session) settleLooks(i *item) {
	w, m := s.state, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(m.looks)) {
		t := m.looks[name]
		if t.look != unknown || t.over {
			continue
		}
		reason, retry := culprit(t.op).GetReason(), false
		switch {
		case t.failed != nil:
			retry = t.stale
		case t.op.GetFinishTime() == nil && t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED:
			// The node knows the container with another image than the pod has: kubelet is about to replace it.
			s.abort(m.node, t, "the container has another image than the pod's spec")
			t.failed, retry = &failure{failPreparation, fmt.Sprintf("container %s: what runs on node %s is of another image than the pod's spec has", name, m.node.Name)}, true
		case t.op.GetFinishTime() == nil:
			if left := t.begun.Add(s.strategy.deadline + prepareSlack).Sub(s.now); left > 0 {
				*s.wait = sooner(*s.wait, left)
				continue
			}
			s.abort(m.node, t, "it took too long")
			t.failed = &failure{failDeadline, fmt.Sprintf("node %s has not pulled the image of container %s within %s", m.node.Name, name, s.strategy.deadline)}
		case reason == reasonUnchanged:
			t.look = same
			continue
		case reason == reasonMoved:
			t.look = moved
			continue
		default:
			t.failed, retry = &failure{failPreparation, accountOf(t.op)}, slices.Contains(again, reason)
			if reason != "" {
				t.failed.reason = reason
			}
		}
		if retry && m.lookTries < roundsMax {
			m.lookTries++
			s.again(m, min(tellPause<<m.lookTries, tellPauseMax))
		}
	}
}
