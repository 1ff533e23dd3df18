// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"maps"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// work is what is known of a rollout between two reconciles, and can be found out again after a restart. A rollout is reconciled by
// one worker at a time; the conversations with nodes are what the mutex is for.
type work struct {
	uid  types.UID
	wake func()
	// turn is the place among the rollouts that were let in; 0 when it was not. The mutex of Reconciler guards it.
	turn uint64
	// written is the resourceVersion of the last write of the rollout: what is older is not worth looking at.
	written   uint64
	lastWrite time.Time
	// told are the events that are not to be told again.
	told map[string]bool
	// revision is what members, failures and progress are about.
	revision string
	failures map[types.UID]inplace.PodFailure
	// nodes are those that were told anything, and hold pins.
	nodes map[string]nodes.Node
	// progress is a picture of the pods, and when it last changed.
	progress   [4]int
	progressed time.Time
	released   chan struct{} // closed when the nodes have been told that the rollout has ended; nil before
	revisions  *revisions
	// template is what the API server makes of the goal's images in the template of the workload.
	template rewrites
	// refused is why the template of the workload is not changed, by the revision of the goal; api is what goes wrong with it.
	refused map[string]*failure
	api     apiTrouble
	// templated are the goals, by revision, for which the template was written.
	templated map[string]bool
	// history is the goal for which a ReplicaSet was made for the history of a Deployment.
	history string
	// settling is what goes wrong when the workload's controller is to go on.
	settling apiTrouble

	mu sync.Mutex
	// selector chooses the pods that the rollout may be about; nil until it is known.
	selector labels.Selector
	members  map[types.UID]*member
	keys     map[string]*keys
}

// keys are credentials, and when they were read.
type keys struct {
	ring *pullsecrets.Keyring
	at   time.Time
}

// member is a pod of a rollout.
type member struct {
	uid  types.UID
	node nodes.Node
	// revision is the goal that the fields below are about.
	revision string
	// written is the resourceVersion of the last write of the pod.
	written   uint64
	turn      bool
	plain     bool      // without preparation by the node
	round     int       // of the preparation
	tries     int       // of those that had a reason of their own
	gaveWay   bool      // the last one gave way to somebody's restart
	lookTries int       // of the questions for tags
	lost      time.Time // since when there is no such node
	retryAt   time.Time
	settled   bool
	// refused is why the pod must not be changed.
	refused *failure
	// api is what went wrong with the API server since something last went well.
	api apiTrouble
	// readySeen is when the containers of readyIDs were first seen ready.
	readySeen time.Time
	readyIDs  string
	// started are when containers with a startupProbe were first seen running, by ID.
	started map[string]time.Time
	nudges  pods.Nudges
	marked  string // the annotation that mark was read from
	mark    *mark

	// The rest is guarded by the mutex of work.

	// visit is the conversation about the upgrade, restart that about the containers of the mark to restart.
	visit, restart *talk
	// looks are those about the tags of containers, by container.
	looks map[string]*talk
	// answers are what the API server makes of the images of the goal in this pod.
	answers rewrites
	// more are the images that it gives other containers of the pod when it is changed.
	more map[string]string
}

// answersOf reads the answers.
func (m *member) answersOf(w *work) rewrites {
	w.mu.Lock()
	defer w.mu.Unlock()
	return m.answers
}

// learnMore keeps what the API server makes of containers that nobody has asked to be changed.
func (w *work) learnMore(m *member, t *talk, more map[string]string) {
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

// learn keeps what the API server makes of images, besides what it has said of other containers.
func (w *work) learn(m *member, t *talk, asked map[string]string, answers rewrites) {
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

// talk is a conversation with a node about one operation.
type talk struct {
	uid    string
	begun  time.Time
	cancel context.CancelFunc // nil until it runs
	over   bool               // nothing more is said
	// asked says that op is the node's word: nil means that it has none.
	asked bool
	op    *opsv1.Operation
	// failed ends it.
	failed *failure
	stale  bool
	// takenBack says that the node was told that it has failed.
	takenBack bool
	// same says that there is nothing to do: what the API server would make of the images is there.
	same bool
	// api is what went wrong with the API server last, and how often.
	api apiTrouble
	// look is what has come of a question for a tag.
	look lookResult
	// inquires says that it only asks what has become of another goal's operation.
	inquires bool
	// committed says that CommitUpgrade was taken, or is under way.
	committed bool
}

// memberOf finds the member of a pod, or makes it. If it was about another revision, the conversation about the upgrade for that is returned, too.
func (w *work) memberOf(pod *corev1.Pod, revision string) (m *member, dropped *talk) {
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

// drop ends the conversations about a member. The caller holds the mutex.
func (w *work) drop(m *member) {
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

// keep forgets the members that are not in pods.
func (w *work) keep(pods map[types.UID]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for uid, m := range w.members {
		if !pods[uid] {
			w.drop(m)
			delete(w.members, uid)
		}
	}
}

// close ends all conversations.
func (w *work) close() { w.keep(nil) }

// knowledge is what judge is to know of a member.
func (w *work) knowledge(m *member, pod *corev1.Pod, begun time.Time) knowledge {
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

// noteReady keeps when the containers as they are were first seen ready.
func (m *member) noteReady(pod *corev1.Pod, now time.Time) {
	ready := conditionOf(pod, corev1.ContainersReady)
	if ready == nil || ready.Status != corev1.ConditionTrue {
		m.readySeen = time.Time{}
		return
	}
	ids := ""
	for _, c := range pod.Status.ContainerStatuses {
		ids += c.ContainerID + " "
	}
	if m.readySeen.IsZero() || m.readyIDs != ids {
		m.readySeen, m.readyIDs = now, ids
	}
}

// noteStarted keeps when containers with a startupProbe were first seen running.
func (m *member) noteStarted(pod *corev1.Pod, now time.Time) {
	var seen map[string]time.Time
	for _, c := range startupProbed(pod) {
		cs := statusOf(pod, c.Name)
		if cs == nil || cs.State.Running == nil {
			continue
		}
		if seen == nil {
			seen = map[string]time.Time{}
		}
		seen[cs.ContainerID] = now
		if first, known := m.started[cs.ContainerID]; known {
			seen[cs.ContainerID] = first
		}
	}
	m.started = seen
}

// stale says that the cache has not caught up with the last write.
func (m *member) stale(pod *corev1.Pod) bool { return versionOf(pod.ResourceVersion) < m.written }

func versionOf(text string) uint64 {
	version, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return version
}
