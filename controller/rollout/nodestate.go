// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// state is what the controller remembers of the pods of a rollout and of what nodes do for them. Operation trackers write into it, too: the
// mutex is for that.
type state struct {
	uid  types.UID
	wake func()
	// nodes are the nodes that were told anything, and may hold pins.
	nodes map[string]controller.Node

	mu      sync.Mutex
	members map[types.UID]*member
	keys    map[string]*keys
}

func newState(uid types.UID, wake func()) *state {
	return &state{uid: uid, wake: wake, nodes: map[string]controller.Node{}, members: map[types.UID]*member{}, keys: map[string]*keys{}}
}

// size returns how many pods there are.
func (w *state) size() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.members)
}

// keys are credentials with the time when they were read.
type keys struct {
	ring *pullsecrets.Keyring
	at   time.Time
}

// learnMore remembers the images that admission gives to containers which the goal does not name.
func (w *state) learnMore(m *member, t *talk, more map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t != nil && t.over {
		return
	}
	known := map[string]string{} // the old one may be being read
	maps.Copy(known, m.more)
	maps.Copy(known, more)
	m.more = known
}

// learn remembers what admission makes of images, and keeps what it has said of other containers.
func (w *state) learn(m *member, t *talk, asked map[string]string, answers rewrites) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t != nil && t.over {
		return
	}
	known := rewrites{} // the old one may be being read
	maps.Copy(known, m.answers)
	for name := range asked {
		delete(known, name)
	}
	maps.Copy(known, answers)
	m.answers = known
}

// memberOf returns what is known of a pod. If that was about another revision, it begins anew, and returns the upgrade for the other
// revision, too.
func (w *state) memberOf(pod *corev1.Pod, revision string) (m *member, dropped *talk) {
	w.mu.Lock()
	defer w.mu.Unlock()
	m = w.members[pod.UID]
	if m == nil {
		m = &member{uid: pod.UID, revision: revision}
		w.members[pod.UID] = m
	}
	if m.revision != revision {
		dropped = m.visit
		w.drop(m)
		*m = member{
			uid: pod.UID, revision: revision, written: m.written, turn: m.turn, node: m.node, readySeen: m.readySeen,
			readyIDs: m.readyIDs, started: m.started, nudges: m.nudges, marked: m.marked, mark: m.mark,
		}
	}
	if text := pod.Annotations[inplace.PodStateAnnotation]; text != m.marked {
		m.marked, m.mark = text, markOf(pod)
	}
	return m, dropped
}

// drop ends the interest in the operations of a pod. The caller holds the mutex.
func (w *state) drop(m *member) {
	for _, t := range []*talk{m.visit, m.restart} {
		t.end()
	}
	for _, t := range m.looks {
		t.end()
	}
	m.visit, m.restart, m.looks = nil, nil, nil
}

func (t *talk) end() {
	if t != nil {
		t.over = true
		if t.cancel != nil {
			t.cancel()
		}
	}
}

// keep forgets all other pods.
func (w *state) keep(pods map[types.UID]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for uid, m := range w.members {
		if !pods[uid] {
			w.drop(m)
			delete(w.members, uid)
		}
	}
}

// close forgets all pods.
func (w *state) close() { w.keep(nil) }

// knowledge returns the facts about a pod.
func (w *state) knowledge(m *member, pod *corev1.Pod, begun time.Time) knowledge {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := knowledge{begun: begun, turn: m.turn, readySeen: m.readySeen, seen: m.started, settled: m.settled, answers: m.answers, more: m.more}
	if t := m.visit; t != nil {
		if m.mark != nil && t.uid == m.mark.Operation {
			k.op, k.asked = t.op, t.asked
		}
		k.failed = t.failed
	}
	if t := m.restart; t != nil && m.mark != nil && t.uid == m.mark.restartUID(pod) {
		k.restart, k.rested = t.op, t.asked && (t.op == nil || t.op.GetFinishTime() != nil) || t.failed != nil
		if k.failed == nil && !t.inquires {
			k.failed = t.failed
		}
		if !t.inquires {
			k.refused = t.failed
		}
	}
	for name, t := range m.looks {
		if t.uid != w.lookUID(m, pod, name) {
			continue // another container runs by now
		}
		if k.looks == nil {
			k.looks = map[string]lookResult{}
		}
		if k.looks[name] = t.look; k.failed == nil {
			k.failed = t.failed
		}
	}
	if k.failed == nil {
		k.failed = m.refused
	}
	return k
}
