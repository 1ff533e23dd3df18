// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package evaluate finds out how far the pods of a rollout are, and which pods are next. It depends
// on nothing but its arguments: the pods, the state that rollouts have written into them, and what
// the controller knows besides.
package evaluate

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// Stage is how far a pod is on its way to a goal.
type Stage int

const (
	// Outdated pods still lack something that has to be written into them.
	Outdated Stage = iota
	// Updating pods were written, and have not got there yet.
	Updating
	// Updated pods run what they should. They need not be available.
	Updated
	// Broken pods will not get there by themselves.
	Broken
	// Skipped pods need more than other images. The rollout leaves them to their workload.
	Skipped
)

// Reasons of pods that fail, besides the node's own.
const (
	FailNoContainer  = "NoSuchContainer"
	failStatic       = "StaticPod"
	failExited       = "ContainerExited"
	failCrashed      = "ContainerCrashed"
	FailDeadline     = "ProgressDeadlineExceeded"
	failRestart      = "RestartFailed"
	FailUnreachable  = "NodeUnreachable"
	FailRefused      = "NodeRefuses"
	FailBypassed     = "NodeBypassed" // kubelet is led past cri-proxy there
	FailOutdated     = "ProxyOutdated"
	FailPreparation  = "PreparationFailed"
	failPodEnded     = "PodEnded"
	FailEndsJob      = "WouldEndJob"
	FailDenied       = "AdmissionDenied"
	FailRewritten    = "ImageRewritten"
	waitImagePull    = "ImagePullBackOff"
	waitInvalidImage = "InvalidImageName"
	waitNeverPull    = opsv1.ReasonErrImageNeverPull
	waitCrashLoop    = "CrashLoopBackOff"
)

const (
	// crashWithin: a container that ends sooner after its start than this is broken, whatever
	// minReadySeconds says.
	crashWithin = 10 * time.Second
	// statusTimeout is how long the pod's status may lag: after that time a container with another
	// ID counts as the new one, even if the status does not name the new image.
	statusTimeout = 15 * time.Second
)

// Failure says why a pod does not reach its goal.
type Failure struct{ Reason, Message string }

// PodFacts are what the controller knows of a pod and cannot read from the pod itself.
type PodFacts struct {
	// Begun is when the rollout took the goal up. Pods that were created later need no restart for
	// it.
	Begun time.Time
	// Op is the node's operation that State names, Restart the operation for the containers that
	// keep their images. Answered says that the node has answered the question for Op: if Op is nil
	// then, the node does not have it.
	Op, Restart *opsv1.Operation
	Answered    bool
	// Rested says that no node works any more on the restarts that State asks for, where State
	// belongs to another goal.
	Rested bool
	// Failed says why the node could not prepare or restart anything, Refused why it has not
	// accepted the restart.
	Failed, Refused *Failure
	// Updating says that the rollout changes the pod now, or is about to.
	Updating bool
	// ReadySeen is when the controller first saw the present containers ready.
	ReadySeen time.Time
	// Carried says that kubelet takes a new container for started because the old one was.
	// StartedSeen is when the controller first saw each container with a startupProbe running, by
	// container ID.
	Carried     bool
	StartedSeen map[string]time.Time
	// Settled says that the pod was available after the change.
	Settled bool
	// Answers are the images that admission puts into this pod instead of the goal's.
	Answers Rewrites
	// Tags say what the tag of a container names now, by container.
	Tags map[string]Tag
	// More are the images that admission gives to other containers when the pod is changed.
	More map[string]string
	now  time.Time
}

// Has returns true if the container has the wanted image, or the image that admission makes of the
// wanted one. State may be nil.
func (k PodFacts) Has(m *InPlaceState, container, have, want string) bool {
	if have == want || k.Answers[container].covers(want, have) {
		return true
	}
	return m != nil && (m.Containers[container].covers(want, have) || m.There[container].covers(want, have))
}

// PodRef is a pod with its State, its goal, and the facts about it.
type PodRef struct {
	Pod   *corev1.Pod
	State *InPlaceState
	Goal  Goal
	Facts PodFacts
}

// PodStatus is how far a pod is, and what has to be done for it.
type PodStatus struct {
	Stage Stage
	// Images and Restarts have to be written into the pod: new images, and containers to restart.
	Images   map[string]string
	Restarts []string
	// CheckTags are the containers whose tag may name another image than the one that runs: the
	// node has to be asked.
	CheckTags []string
	// Serving pods are ready and have started. Available pods have been serving for long enough.
	// Nobody may count on disrupted pods.
	Serving, Available, Disrupted bool
	// Open says that the pod's readiness gates have to be opened.
	Open bool
	// Ask: ask the node for the operation that State names. Restart: have the node restart the
	// containers of State. Inquire: ask the node whether it still restarts them for another goal.
	Ask, Restart, Inquire bool
	// Recovered pods are available after their change.
	Recovered bool
	Failure   Failure
	// Wait is how long until the status changes by the passing of time alone; 0 means never.
	Wait time.Duration
}

func (v *PodStatus) fail(reason, format string, args ...any) {
	v.Stage, v.Failure = Broken, Failure{reason, fmt.Sprintf(format, args...)}
}

// Pod says how far an active pod is. It depends on nothing but its arguments.
func Pod(pod *corev1.Pod, m *InPlaceState, g Goal, k PodFacts, s *Strategy, now time.Time) PodStatus {
	var v PodStatus
	k.now = now
	shut, _ := OutOfServiceBy(pod)
	v.Available, v.Wait = available(pod, k, s, now)
	v.Serving = isTrue(pods.Condition(pod, corev1.PodReady))
	moving, wait := m.moving(pod, g, k)
	v.Wait = retry.Sooner(v.Wait, wait)
	v.Inquire = moving && !m.IsOf(g) && !k.Rested && m.restarts(pod)
	v.Disrupted = k.Updating || shut != "" || moving
	if passed, _ := started(pod, k, now); v.Serving && !passed {
		v.Serving, v.Disrupted = false, true // whatever its condition says
	}

	var made *InPlaceState // the State of another goal would tell what admission made of images at that time
	if m.IsOf(g) {
		made = m
	}
	v.Images = map[string]string{}
	for name, image := range g.Images {
		c := pods.Changeable(pod, name)
		if c == nil {
			v.fail(FailNoContainer, "%s", PodLacks(pod, name, ToChange))
			return v
		}
		switch {
		case !k.Has(made, name, c.Image, image):
			v.Images[name] = image
		case !m.IsOf(g) && g.tags && !pod.CreationTimestamp.After(k.Begun) && mayMove(pod, c):
			switch k.Tags[name] {
			case TagUnknown:
				v.CheckTags = append(v.CheckTags, name)
			case TagMoved:
				v.Restarts = append(v.Restarts, name) // as kubelet would: it starts what the tag names now
			}
		}
	}
	slices.Sort(v.CheckTags)
	if len(v.Images) > 0 {
		for name, image := range k.More {
			if c := pods.Changeable(pod, name); c != nil && g.Images[name] == "" && !k.Has(made, name, c.Image, image) {
				v.Images[name] = image // they change together, and go back together
			}
		}
	}
	for _, name := range g.Restarts {
		c := pods.Changeable(pod, name)
		if c == nil {
			v.fail(FailNoContainer, "%s", PodLacks(pod, name, ToRestart))
			return v
		}
		_, done := Previous{}, false
		if m.IsOf(g) {
			_, done = m.Containers[name]
		}
		if !done && !pod.CreationTimestamp.After(k.Begun) {
			v.Restarts = append(v.Restarts, name)
		}
	}
	switch {
	case len(v.Images)+len(v.Restarts)+len(v.CheckTags) > 0:
		v.Stage = Outdated
		switch {
		case Static(pod) != "":
			v.fail(failStatic, "%s", Static(pod))
		case k.Failed != nil:
			v.fail(k.Failed.Reason, "%s", k.Failed.Message)
			v.Open = shut == g.Rollout
			v.Disrupted = shut != "" || moving
		}
		return v
	case !m.IsOf(g):
		v.Stage = Updated
		v.Open = shut == g.Rollout && !moving // shut for a change that is not wanted any more
		v.afterCreation(pod, k, s, now)
		return v
	}
	v.afterChange(pod, m, g, k, s, moving, now)
	return v
}

// PodLacks says in words that a pod has no such container.
func PodLacks(pod *corev1.Pod, name, change string) string {
	return Lacks("pod "+pod.Name, name, change, pods.Names(pod))
}

// Static says in words that a pod is a static pod; empty for other pods.
func Static(pod *corev1.Pod) string {
	if !mirrorpod.Is(pod) {
		return ""
	}
	return fmt.Sprintf("pod %s is a static pod, which is changed on its node only: for another image change its "+
		"manifest on node %s, "+
		"to restart its containers make a ContainerRecreateRequest for it", pod.Name, pod.Spec.NodeName)
}

// afterChange completes the status of a pod that was changed for the goal.
func (v *PodStatus) afterChange(
	pod *corev1.Pod, m *InPlaceState, g Goal, k PodFacts, s *Strategy, moving bool, now time.Time,
) {
	v.Stage = Updating
	v.Ask = !k.Answered && m.Operation != ""
	if moving {
		v.Restart = k.Restart == nil && m.restarts(pod)
		if k.Restart.GetFinishTime() != nil && k.Restart.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			// The node has left the old container as it was: the pod is what it was.
			shut, _ := OutOfServiceBy(pod)
			v.fail(failRestart, "%s", AccountOf(k.Restart))
			v.Open, v.Disrupted = shut == g.Rollout, shut != ""
			return
		}
		if why := k.Refused; why != nil && k.Restart == nil && m.restarts(pod) {
			v.fail(why.Reason, "%s", why.Message)
			if why.Reason != FailUnreachable { // else it may be at work
				shut, _ := OutOfServiceBy(pod)
				v.Open, v.Disrupted = shut == g.Rollout, shut != ""
			}
			return
		}
	} else {
		ready, wait := containersReady(pod, k, s, now)
		v.Wait = retry.Sooner(v.Wait, wait)
		shut, _ := OutOfServiceBy(pod)
		v.Open = ready && shut == g.Rollout
		if k.Settled || v.Available && shut == "" {
			v.Stage, v.Recovered, v.Disrupted, v.Ask = Updated, v.Available, k.Updating && !v.Available, false
			return
		}
		if wasReady(pod, m, k) {
			v.Stage, v.Ask = Updated, false // whatever it suffers from came later
			return
		}
	}
	if why := BrokenContainer(pod, m, s); why != nil {
		v.fail(why.Reason, "%s", why.Message)
	} else if left := m.Time.Add(s.Deadline).Sub(now); left <= 0 {
		v.fail(FailDeadline, "pod %s is not available %s after its change%s", pod.Name, s.Deadline, waitingFor(pod))
	} else {
		v.Wait = retry.Sooner(v.Wait, left)
	}
}

// afterCreation completes the status of a pod that has what it should have without any change. If
// it was created since the rollout began and does not come up, the rollout is at fault.
func (v *PodStatus) afterCreation(pod *corev1.Pod, k PodFacts, s *Strategy, now time.Time) {
	if v.Available || k.Settled || !pod.CreationTimestamp.After(k.Begun) || pod.Spec.NodeName == "" {
		return
	}
	if why := BrokenContainer(pod, nil, s); why != nil && why.Reason != failExited {
		v.fail(why.Reason, "%s", why.Message)
	} else if left := pod.CreationTimestamp.Add(s.Deadline).Sub(now); left <= 0 {
		v.fail(FailDeadline, "pod %s is not available %s after its creation%s", pod.Name, s.Deadline, waitingFor(pod))
	} else {
		v.Wait = retry.Sooner(v.Wait, left)
	}
}

// moving returns true if a container of the state may still be replaced. wait is how long until
// time alone decides that.
func (m *InPlaceState) moving(pod *corev1.Pod, g Goal, k PodFacts) (moving bool, wait time.Duration) {
	if m == nil {
		return false, 0
	}
	for name, w := range m.Containers {
		c := pods.Changeable(pod, name)
		if c == nil || replaced(pod, m, name, w, c.Image, k) {
			continue
		}
		left := time.Duration(0)
		if !m.IsOf(g) {
			var settled bool
			if settled, left = m.settled(pod, name, w, c.Image, k); settled {
				continue
			}
		}
		moving, wait = true, max(wait, left)
	}
	return moving, wait
}

// settled is about a container that was not replaced, though the state of another goal says that it
// should be. It returns true if nobody will replace it for that goal any more. Kubelet still brings
// what runs to the spec.
func (m *InPlaceState) settled(
	pod *corev1.Pod, name string, w Previous, image string, k PodFacts,
) (is bool, wait time.Duration) {
	cs := pods.Status(pod, name)
	switch {
	case cs == nil || cs.ContainerID == "":
		return false, 0 // the pod is not available anyway
	case cs.ContainerID != w.ID:
		// Another container of the same image. If the old one crashed just before the patch,
		// kubelet replaces this one within the timeout.
		left := statusTimeout - k.now.Sub(m.Time.Time)
		return left <= 0, max(left, 0)
	case image != w.Image:
		return false, 0 // kubelet has not acted yet
	}
	return k.Rested, 0
}

// restarts returns true if a container of the state that keeps its image is still the old one.
func (m *InPlaceState) restarts(pod *corev1.Pod) bool {
	for name, w := range m.Containers {
		if c := pods.Changeable(pod, name); c != nil && c.Image == w.Image {
			if cs := pods.Status(pod, name); cs != nil && cs.ContainerID == w.ID {
				return true
			}
		}
	}
	return false
}

// replaced returns true if the pod's status shows the container that was made for the change.
func replaced(pod *corev1.Pod, m *InPlaceState, name string, w Previous, image string, k PodFacts) bool {
	cs := pods.Status(pod, name)
	if cs == nil || cs.ContainerID == "" {
		return false
	}
	if cs.ContainerID == w.ID {
		// The change was taken back before kubelet acted on it: there is nothing to replace.
		return w.Base == image && w.Image != image && cs.State.Running != nil && sameImage(cs.Image, image) &&
			k.now.Sub(m.Time.Time) >= statusTimeout
	}
	if w.Image == image || w.ImageID != "" && cs.ImageID != "" && cs.ImageID != w.ImageID ||
		sameImage(cs.Image, image) {
		return true
	}
	if m.Operation == "" {
		// The status may name the same content by the name of the old image.
		return cs.State.Running == nil || w.ID != "" || cs.State.Running.StartedAt.After(m.Time.Add(statusTimeout))
	}
	// If the old container crashed between the last look at it and the patch, the ID differs, too.
	// The node knows which one it is.
	for _, c := range k.Op.GetContainers() {
		if c.GetName() == name && c.GetSuccessorId() != "" && c.GetSuccessorId() == pods.BareID(cs.ContainerID) {
			return true
		}
	}
	return k.Answered && (k.Op == nil || k.Op.GetFinishTime() != nil)
}

// sameImage returns true if two references, as people write them, are the same.
func sameImage(a, b string) bool {
	x, err1 := reference.ParseDockerRef(a)
	y, err2 := reference.ParseDockerRef(b)
	return err1 == nil && err2 == nil && x.String() == y.String()
}

// BrokenContainer finds a container that will not get ready, or has ended too soon. If the state is
// nil it looks at all containers.
func BrokenContainer(pod *corev1.Pod, m *InPlaceState, s *Strategy) *Failure {
	names := pods.Names(pod)
	if m != nil {
		names = names[:0]
		for name := range m.Containers {
			names = append(names, name)
		}
		slices.Sort(names)
	}
	for _, name := range names {
		cs := pods.Status(pod, name)
		if cs == nil {
			continue
		}
		if w := cs.State.Waiting; w != nil {
			// The status may still show what the old container waited for.
			c := pods.Changeable(pod, name)
			switch {
			case w.Reason == waitCrashLoop && (m == nil || cs.ContainerID != m.Containers[name].ID),
				slices.Contains([]string{waitImagePull, waitInvalidImage, waitNeverPull}, w.Reason) && c != nil &&
					strings.Contains(w.Message, c.Image):
				return &Failure{w.Reason, fmt.Sprintf("container %s: %s", name, w.Message)}
			}
		}
		if m == nil {
			continue
		}
		old := m.Containers[name].ID
		if t := cs.State.Terminated; t != nil && cs.ContainerID != old {
			return &Failure{failExited, fmt.Sprintf("container %s: the new one ended (exit code %d, %s)", name,
				t.ExitCode, t.Reason)}
		}
		if t := cs.LastTerminationState.Terminated; t != nil && cs.ContainerID != old && t.ContainerID != "" &&
			t.ContainerID != old && !t.StartedAt.Time.Before(m.Time.Truncate(time.Second)) &&
			t.FinishedAt.Sub(t.StartedAt.Time) < max(s.MinReady, crashWithin) {
			return &Failure{failCrashed, fmt.Sprintf("container %s: the new one ended after %s (exit code %d, %s)",
				name, t.FinishedAt.Sub(t.StartedAt.Time).Round(time.Second), t.ExitCode, t.Reason)}
		}
	}
	return nil
}

// waitingFor says in words what keeps a pod from being available.
func waitingFor(pod *corev1.Pod) string {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, c := range list {
			switch {
			case c.State.Waiting != nil:
				return fmt.Sprintf(": container %s is waiting (%s)", c.Name, c.State.Waiting.Reason)
			case c.State.Running != nil && !c.Ready:
				return fmt.Sprintf(": container %s is not ready", c.Name)
			}
		}
	}
	return ""
}

// Culprit returns the container for which an operation failed; nil if there is none.
func Culprit(op *opsv1.Operation) *opsv1.ContainerOperation {
	var found *opsv1.ContainerOperation
	for _, c := range op.GetContainers() {
		if c.GetPhase() == opsv1.Phase_PHASE_FAILED || c.GetPhase() == opsv1.Phase_PHASE_CANCELLED {
			if found == nil || found.GetReason() == opsv1.ReasonOtherContainerFailed {
				found = c
			}
		}
	}
	return found
}

// AccountOf says in words why an operation failed.
func AccountOf(op *opsv1.Operation) string {
	c := Culprit(op)
	switch {
	case c == nil:
		return op.GetMessage()
	case c.GetMessage() == "":
		return fmt.Sprintf("container %s: %s", c.GetName(), c.GetPull().GetMessage())
	}
	return fmt.Sprintf("container %s: %s", c.GetName(), nodes.Account(c))
}
