// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"slices"

	"github.com/distribution/reference"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// A pod whose container has the image of the goal already need not run it: a tag may have moved. With imagePullPolicy Always kubelet resolves
// the tag again whenever it starts the container, so a rollout does, too. The node is asked before the pod's turn comes: it pulls, and says
// whether the tag names what runs. If not the container is restarted in its turn. Nothing of the pod's spec changes, so kubelet has no part in it.

// lookResult is what the node has found a container's tag to name.
type lookResult int

const (
	unknown lookResult = iota
	same               // the image that runs
	moved              // another one
)

// reasonMoved is the node's word for a tag that names another image than the one that runs.
const reasonMoved = "ImageMoved"

// mayMove says that what a running container's image names may be another one by now, for kubelet too.
func mayMove(pod *corev1.Pod, c *corev1.Container) bool {
	if c.ImagePullPolicy != corev1.PullAlways {
		return false
	}
	if ref, err := reference.ParseDockerRef(c.Image); err == nil {
		if _, fixed := ref.(reference.Digested); fixed {
			return false
		}
	}
	_, running := idsOf(pod, []string{c.Name})
	return running // else kubelet pulls before it starts it
}

// lookUID is what the node of a pod calls the question for a container's tag.
func (w *work) lookUID(m *member, pod *corev1.Pod, container string) string {
	ids, _ := idsOf(pod, []string{container})
	return operationUID("t", goal{rollout: w.uid, revision: m.revision}, pod, ids, m.lookTries)
}

// looking is how far the node is with the tags.
func (p *pass) looking(i *item) readiness {
	if len(i.verdict.looks) == 0 {
		return prepared
	}
	if p.now.Before(i.m.retryAt) {
		return preparing
	}
	p.work.mu.Lock()
	defer p.work.mu.Unlock()
	for _, name := range i.verdict.looks {
		if t := i.m.looks[name]; t == nil || t.uid != p.work.lookUID(i.m, i.pod, name) {
			return unprepared
		}
	}
	return preparing
}

// look asks the node what the tags of a pod's containers name.
func (p *pass) look(ctx context.Context, i *item) {
	w, m := p.work, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range i.verdict.looks {
		uid := w.lookUID(m, i.pod, name)
		if t := m.looks[name]; t != nil && t.uid == uid {
			continue
		}
		m.looks[name].end()
		t := &talk{uid: uid, begun: p.now}
		node, err := p.node(ctx, i.pod)
		if err != nil {
			// A node that is taken away takes its pods with it, soon.
			if m.lost.IsZero() {
				m.lost = p.now
			}
			if p.now.Sub(m.lost) < p.strategy.deadline {
				p.again(m, tellPauseMax)
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
		request := p.upgradeRequest(i, uid)
		c := &conversation{r: p.r, w: w, t: t, node: node, pod: i.pod.Name, patience: p.strategy.deadline}
		c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
			now, err := p.r.launch(ctx, w, i.pod, "")
			if err != nil {
				return nil, err
			}
			want := &opsv1.ContainerUpgrade{Name: name, Image: container.Image, Order: opsv1.Order_ORDER_STOP_FIRST}
			if want.PullPolicy, want.Environment, err = now.container(ctx, name); err != nil {
				return nil, err
			}
			request.Credentials, request.Containers = now.ring.For(pullsecrets.Pulled(want.Image, want.PullPolicy, want.Environment)...), []*opsv1.ContainerUpgrade{want}
			op, err := p.r.Nodes.PrepareUpgrade(ctx, node, request)
			if code(err) == codes.AlreadyExists {
				op, err = p.r.Nodes.GetOperation(ctx, node, uid)
			}
			return op, err
		}
		c.start()
	}
}

// settleLooks takes notice of what the node says of tags.
func (p *pass) settleLooks(i *item) {
	w, m := p.work, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range sortedKeys(m.looks) {
		t := m.looks[name]
		if t.look != unknown || t.over {
			continue
		}
		reason, retry := culprit(t.op).GetReason(), false
		switch {
		case t.failed != nil:
			retry = t.stale
		case t.op.GetFinishTime() == nil && t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED:
			// For the node the container has another image than the pod: kubelet is about to replace it.
			p.abort(m.node, t, "the container has another image than the pod's spec")
			t.failed, retry = &failure{failPreparation, fmt.Sprintf("container %s: what runs on node %s is of another image than the pod's spec has", name, m.node.Name)}, true
		case t.op.GetFinishTime() == nil:
			if left := t.begun.Add(p.strategy.deadline + prepareSlack).Sub(p.now); left > 0 {
				p.wait = sooner(p.wait, left)
				continue
			}
			p.abort(m.node, t, "it took too long")
			t.failed = &failure{failDeadline, fmt.Sprintf("node %s has not pulled the image of container %s within %s", m.node.Name, name, p.strategy.deadline)}
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
			p.again(m, min(tellPause<<m.lookTries, tellPauseMax))
		}
	}
}
