// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// PodOps is what the controller remembers of a pod, and of what its node does for the pod.
type PodOps struct {
	uid  types.UID
	node nodes.Node
	// revision is the revision of the goal that the fields below are about.
	revision string
	// Fresh knows the last write of the pod.
	Fresh    objects.Freshness
	Updating bool      // the rollout changes the pod
	Plain    bool      // change the pod without a preparation by the node
	round    int       // how often the preparation has begun anew
	tries    int       // how many of those rounds count as failures
	gaveWay  bool      // the last preparation gave way to somebody's restart
	tagTries int       // how often tags were checked again
	lost     time.Time // since when there is no such node
	retryAt  time.Time
	Settled  bool
	// Refused is why the pod must not be changed.
	Refused *evaluate.Failure
	// API counts errors of the API server since the last success.
	API dryrun.Trouble
	// readySeen is when the controller first saw the containers of readyIDs ready.
	readySeen time.Time
	readyIDs  string
	// Started is when the controller first saw each container with a startupProbe running, by ID.
	Started map[string]time.Time
	Nudges  pods.Nudges
	marked  string // the annotation that State was read from
	State   *evaluate.InPlaceState

	// The mutex of the state guards the rest.

	// Upgrade is the operation with new images, restart the one that restarts the containers of
	// State.
	Upgrade, restart *nodeOperation
	// Tags are the operations that check tags, by container.
	Tags map[string]*nodeOperation
	// answers are the images that admission makes of the goal's in this pod.
	answers evaluate.Rewrites
	// more are the images that admission gives to other containers when the pod is changed.
	more map[string]string
}

// AnswersOf reads the answers.
func (m *PodOps) AnswersOf(w *State) evaluate.Rewrites {
	w.mu.Lock()
	defer w.mu.Unlock()
	return m.answers
}

// nodeOperation is one operation on a node, as far as the controller knows.
type nodeOperation struct {
	uid    string
	begun  time.Time
	forget func() // ends the follow; nil if there is none
	over   bool   // the controller has lost interest
	// answered says that the node has answered. If op is nil then, the node does not have the
	// operation.
	answered bool
	op       *opsv1.Operation
	// failed is why the operation has failed, or could not be begun. stale says that the pod was
	// not what the command expected.
	failed *evaluate.Failure
	stale  bool
	// takenBack says that the node was told to take the operation back.
	takenBack bool
	// same says that there is nothing to do: the pod has the images that admission would make.
	same bool
	// api counts errors of the API server.
	api dryrun.Trouble
	// tag is the answer of an operation that checks a tag.
	tag evaluate.Tag
	// inquires says that the controller only asks for the operation of another goal.
	inquires bool
	// commitRequested says that the node has accepted CommitUpgrade, or that the call is under way.
	commitRequested bool
}

// NoteReady remembers when the present containers were first seen ready.
func (m *PodOps) NoteReady(pod *corev1.Pod, now time.Time) {
	ready := pods.Condition(pod, corev1.ContainersReady)
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

// NoteStarted remembers when containers with a startupProbe were first seen running.
func (m *PodOps) NoteStarted(pod *corev1.Pod, now time.Time) {
	var seen map[string]time.Time
	for _, c := range evaluate.StartupProbed(pod) {
		cs := pods.Status(pod, c.Name)
		if cs == nil || cs.State.Running == nil {
			continue
		}
		if seen == nil {
			seen = map[string]time.Time{}
		}
		seen[cs.ContainerID] = now
		if first, known := m.Started[cs.ContainerID]; known {
			seen[cs.ContainerID] = first
		}
	}
	m.Started = seen
}

// roundsMax is how often the preparation of a pod begins anew.
const roundsMax = 8

// Item is a pod as one look at the rollout finds it.
type Item struct {
	evaluate.PodRef
	Ops     *PodOps
	Status  evaluate.PodStatus
	Ordinal int
	Stale   bool
	// Unlabelled says that the label of the pod does not name its revision.
	Unlabelled bool
}

// Change returns the change of a pod. answers are what admission has made of its images before.
func (s *Session) Change(i *Item, operation string, answers evaluate.Rewrites) *dryrun.PodChange {
	m := &evaluate.InPlaceState{Rollout: s.Rollout.UID, Revision: i.Goal.Revision, Operation: operation,
		Time: metav1.NewMicroTime(s.Now), Containers: map[string]evaluate.Previous{}}
	unfinished := i.Ops.State != nil && i.Ops.State.Rollout == s.Rollout.UID &&
		i.Ops.State.Time.After(lastSuccess(s.Rollout))
	for _, name := range append(objects.SortedKeys(i.Status.Images), i.Status.Restarts...) {
		c := pods.Changeable(i.Pod, name)
		w := evaluate.Previous{Image: c.Image, Base: c.Image}
		if cs := pods.Status(i.Pod, name); cs != nil {
			w.ID, w.ImageID = cs.ContainerID, cs.ImageID
		}
		if unfinished {
			if old := i.Ops.State.Containers[name]; old.Base != "" {
				w.Base = old.Base
			}
		}
		if i.Status.Images[name] != "" {
			w.Rewrite = answers[name]
		}
		m.Containers[name] = w
	}
	if unfinished { // containers that are not changed now can still be undone
		for name, old := range i.Ops.State.Containers {
			if c := pods.Changeable(i.Pod, name); c != nil && old.Base != "" && old.Base != c.Image {
				if _, ok := m.Containers[name]; !ok {
					m.Containers[name] = old
				}
			}
		}
	}
	for name := range i.Goal.Images {
		if a, known := i.Facts.Answers[name]; known && i.Status.Images[name] == "" {
			if m.There == nil {
				m.There = evaluate.Rewrites{}
			}
			m.There[name] = a
		}
	}
	return &dryrun.PodChange{Pod: i.Pod, Images: i.Status.Images, Label: s.NewLabel(i), State: m}
}

// lastSuccess is when the rollout last succeeded.
func lastSuccess(r *inplace.InPlaceRollout) time.Time {
	if t := r.Status.LastSuccessTime; t != nil {
		return t.Time
	}
	return time.Time{}
}
