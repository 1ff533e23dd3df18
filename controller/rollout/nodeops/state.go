// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"fmt"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// State is what the controller remembers of the pods of a rollout and of what nodes do for them.
// Operation trackers write into it, too: the mutex is for that.
type State struct {
	uid types.UID
	// request names the rollout to the tracker, which wakes the reconciler.
	request reconcile.Request
	tracker *nodes.Tracker[*opsv1.Operation]
	// nodes are the nodes that were told anything, and may hold pins.
	nodes map[string]nodes.Node

	mu   sync.Mutex
	pods map[types.UID]*PodOps
	keys map[string]*keys
}

// NewState returns the state of a rollout with that UID and name.
func NewState(uid types.UID, name types.NamespacedName, tracker *nodes.Tracker[*opsv1.Operation]) *State {
	return &State{uid: uid, request: reconcile.Request{NamespacedName: name}, tracker: tracker,
		nodes: map[string]nodes.Node{}, pods: map[types.UID]*PodOps{}, keys: map[string]*keys{}}
}

// Size returns how many pods there are.
func (w *State) Size() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.pods)
}

// keys are credentials with the time when they were read.
type keys struct {
	ring *pullsecrets.Keyring
	at   time.Time
}

// LearnMore remembers the images that admission gives to containers which the goal does not name.
func (w *State) LearnMore(m *PodOps, t *nodeOperation, more map[string]string) {
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

// Learn remembers what admission makes of images, and keeps what it has said of other containers.
func (w *State) Learn(m *PodOps, t *nodeOperation, asked map[string]string, answers evaluate.Rewrites) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t != nil && t.over {
		return
	}
	known := evaluate.Rewrites{} // the old one may be being read
	maps.Copy(known, m.answers)
	for name := range asked {
		delete(known, name)
	}
	maps.Copy(known, answers)
	m.answers = known
}

// pod returns what is known of a pod. If that was about another revision, it begins anew, and
// returns the upgrade for the other revision, too.
func (w *State) pod(pod *corev1.Pod, revision string) (m *PodOps, dropped *nodeOperation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	m = w.pods[pod.UID]
	if m == nil {
		m = &PodOps{uid: pod.UID, revision: revision}
		w.pods[pod.UID] = m
	}
	if m.revision != revision {
		dropped = m.Upgrade
		w.drop(m)
		*m = PodOps{
			uid: pod.UID, revision: revision, Fresh: m.Fresh, Updating: m.Updating, node: m.node,
			readySeen: m.readySeen,
			readyIDs:  m.readyIDs, Started: m.Started, Nudges: m.Nudges, marked: m.marked, State: m.State,
		}
	}
	if text := pod.Annotations[inplace.PodStateAnnotation]; text != m.marked {
		m.marked, m.State = text, evaluate.StateOf(pod)
	}
	return m, dropped
}

// drop ends the interest in the operations of a pod. The caller holds the mutex.
func (w *State) drop(m *PodOps) {
	for _, t := range []*nodeOperation{m.Upgrade, m.restart} {
		t.end()
	}
	for _, t := range m.Tags {
		t.end()
	}
	m.Upgrade, m.restart, m.Tags = nil, nil, nil
}

func (t *nodeOperation) end() {
	if t != nil {
		t.over = true
		if t.forget != nil {
			t.forget()
		}
	}
}

// keep forgets all other pods.
func (w *State) keep(pods map[types.UID]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for uid, m := range w.pods {
		if !pods[uid] {
			w.drop(m)
			delete(w.pods, uid)
		}
	}
}

// Close forgets all pods.
func (w *State) Close() { w.keep(nil) }

// Knowledge returns the facts about a pod.
func (w *State) Knowledge(m *PodOps, pod *corev1.Pod, begun time.Time) evaluate.PodFacts {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := evaluate.PodFacts{Begun: begun, Updating: m.Updating, ReadySeen: m.readySeen, StartedSeen: m.Started,
		Settled: m.Settled, Answers: m.answers, More: m.more}
	if t := m.Upgrade; t != nil {
		if m.State != nil && t.uid == m.State.Operation {
			k.Op, k.Answered = t.op, t.answered
		}
		k.Failed = t.failed
	}
	if t := m.restart; t != nil && m.State != nil && t.uid == m.State.RestartUID(pod) {
		k.Restart, k.Rested = t.op, t.answered && (t.op == nil || t.op.GetFinishTime() != nil) || t.failed != nil
		if k.Failed == nil && !t.inquires {
			k.Failed = t.failed
		}
		if !t.inquires {
			k.Refused = t.failed
		}
	}
	for name, t := range m.Tags {
		if t.uid != w.tagUID(m, pod, name) {
			continue // another container runs by now
		}
		if k.Tags == nil {
			k.Tags = map[string]evaluate.Tag{}
		}
		if k.Tags[name] = t.tag; k.Failed == nil {
			k.Failed = t.failed
		}
	}
	if k.Failed == nil {
		k.Failed = m.Refused
	}
	return k
}

// Trouble says what the API server has failed with several times in a row; empty if there is
// nothing.
func (w *State) Trouble(items []*Item) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range items {
		all := []dryrun.Trouble{i.Ops.API}
		if t := i.Ops.Upgrade; t != nil && !t.over && t.failed == nil {
			all = append(all, t.api)
		}
		for _, t := range all {
			if t.Count >= apierror.Tries {
				return fmt.Sprintf("pod %s cannot be changed, %d tries have failed since %s: %s", i.Pod.Name, t.Count,
					t.Since.UTC().Format(time.RFC3339), t.Text)
			}
		}
	}
	return ""
}

// WrongSecrets says which pull secrets of the pods cannot be used, and why.
func (w *State) WrongSecrets() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var wrong []string
	for _, name := range objects.SortedKeys(w.keys) {
		wrong = append(wrong, w.keys[name].ring.Wrong...)
	}
	return wrong
}

// Finished returns the operations that have changed a pod and have succeeded.
func (w *State) Finished(m *PodOps) []*opsv1.Operation {
	w.mu.Lock()
	defer w.mu.Unlock()
	var done []*opsv1.Operation
	for _, t := range []*nodeOperation{m.Upgrade, m.restart} {
		if t != nil && !t.inquires && t.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED && t.op.GetFinishTime() != nil {
			done = append(done, t.op)
		}
	}
	return done
}
