// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller"
)

// PodOps is what the controller remembers of a pod, and of what its node does for the pod.
type member struct {
	uid  types.UID
	node controller.Node
	// revision is the revision of the goal that the fields below are about.
	revision string
	// written is the resourceVersion of the last write of the pod.
	written   uint64
	turn      bool      // the rollout changes the pod
	plain     bool      // change the pod without a preparation by the node
	round     int       // how often the preparation has begun anew
	tries     int       // how many of those rounds count as failures
	gaveWay   bool      // the last preparation gave way to somebody's restart
	lookTries int       // how often tags were checked again
	lost      time.Time // since when there is no such node
	retryAt   time.Time
	settled   bool
	// refused is why the pod must not be changed.
	refused *failure
	// api counts errors of the API server since the last success.
	api apiTrouble
	// readySeen is when the controller first saw the containers of readyIDs ready.
	readySeen time.Time
	readyIDs  string
	// started is when the controller first saw each container with a startupProbe running, by ID.
	started map[string]time.Time
	nudges  controller.Nudges
	marked  string // the annotation that mark was read from
	mark    *mark

	// The mutex of the state guards the rest.

	// Upgrade is the operation with new images, restart the one that restarts the containers of State.
	visit, restart *talk
	// Tags are the operations that check tags, by container.
	looks map[string]*talk
	// answers are the images that admission makes of the goal's in this pod.
	answers rewrites
	// more are the images that admission gives to other containers when the pod is changed.
	more map[string]string
}

// answersOf reads the answers.
func (m *member) answersOf(w *state) rewrites {
	w.mu.Lock()
	defer w.mu.Unlock()
	return m.answers
}

// nodeOperation is one operation on a node, as far as the controller knows.
type talk struct {
	uid    string
	begun  time.Time
	cancel context.CancelFunc // nil until the tracker runs
	over   bool               // the controller has lost interest
	// asked says that the node has answered. If op is nil then, the node does not have the operation.
	asked bool
	op    *opsv1.Operation
	// failed is why the operation has failed, or could not be begun. stale says that the pod was not what the command expected.
	failed *failure
	stale  bool
	// takenBack says that the node was told to take the operation back.
	takenBack bool
	// same says that there is nothing to do: the pod has the images that admission would make.
	same bool
	// api counts errors of the API server.
	api apiTrouble
	// tag is the answer of an operation that checks a tag.
	look lookResult
	// inquires says that the controller only asks for the operation of another goal.
	inquires bool
	// commitRequested says that the node has accepted CommitUpgrade, or that the call is under way.
	committed bool
}

// noteReady remembers when the present containers were first seen ready.
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

// noteStarted remembers when containers with a startupProbe were first seen running.
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

// stale returns true if the cache has not caught up with the last write of the pod.
func (m *member) stale(pod *corev1.Pod) bool { return versionOf(pod.ResourceVersion) < m.written }

func versionOf(text string) uint64 {
	version, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return version
}

// roundsMax is how often the preparation of a pod begins anew.
const roundsMax = 8

// item is a pod as one look at the rollout finds it.
type item struct {
	podRef
	m       *member
	verdict verdict
	ordinal int
	stale   bool
	// unlabelled says that the label of the pod does not name its revision.
	unlabelled bool
}

// armed returns true if the node is ready for the patch of the pod.
func armed(phase opsv1.Phase) bool {
	switch phase {
	case opsv1.Phase_PHASE_ARMED, opsv1.Phase_PHASE_ADOPTING, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING, opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_SUCCEEDED:
		return true
	}
	return false
}

// change returns the change of a pod. answers are what admission has made of its images before.
func (s *session) change(i *item, operation string, answers rewrites) (*podChange, error) {
	m := &mark{Rollout: s.rollout.UID, Revision: i.goal.revision, Operation: operation, Time: metav1.NewMicroTime(s.now), Containers: map[string]was{}}
	change := &podChange{pod: i.pod, images: i.verdict.images, label: s.newLabel(i)}
	unfinished := i.m.mark != nil && i.m.mark.Rollout == s.rollout.UID && i.m.mark.Time.After(s.lastSuccess())
	for _, name := range append(slices.Sorted(maps.Keys(i.verdict.images)), i.verdict.restarts...) {
		c, _ := containerOf(i.pod, name)
		w := was{Image: c.Image, Base: c.Image}
		if cs := statusOf(i.pod, name); cs != nil {
			w.ID, w.ImageID = cs.ContainerID, cs.ImageID
		}
		if unfinished {
			if old := i.m.mark.Containers[name]; old.Base != "" {
				w.Base = old.Base
			}
		}
		if i.verdict.images[name] != "" {
			w.rewrite = answers[name]
		}
		m.Containers[name] = w
	}
	if unfinished { // containers that are not changed now can still be undone
		for name, old := range i.m.mark.Containers {
			if c, _ := containerOf(i.pod, name); c != nil && old.Base != "" && old.Base != c.Image {
				if _, ok := m.Containers[name]; !ok {
					m.Containers[name] = old
				}
			}
		}
	}
	for name := range i.goal.images {
		if a, known := i.known.answers[name]; known && i.verdict.images[name] == "" {
			if m.There == nil {
				m.There = rewrites{}
			}
			m.There[name] = a
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	change.annotations = map[string]any{inplace.PodStateAnnotation: string(text)}
	return change, nil
}

// lastSuccess is when the rollout last succeeded.
func (s *session) lastSuccess() time.Time {
	if t := s.rollout.Status.LastSuccessTime; t != nil {
		return t.Time
	}
	return time.Time{}
}
