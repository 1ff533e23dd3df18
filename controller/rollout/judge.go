// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
)

// Stage is how far a pod is on its way to a goal.
type stage int

const (
	// outdated pods still lack something that has to be written into them.
	outdated stage = iota
	// Updating pods were written, and have not got there yet.
	changing
	// updated pods run what they should. They need not be available.
	updated
	// broken pods will not get there by themselves.
	broken
	// Skipped pods need more than other images. The rollout leaves them to their workload.
	left
)

// Reasons of pods that fail, besides the node's own.
const (
	failNoContainer  = "NoSuchContainer"
	failStatic       = "StaticPod"
	failExited       = "ContainerExited"
	failCrashed      = "ContainerCrashed"
	failDeadline     = "ProgressDeadlineExceeded"
	failRestart      = "RestartFailed"
	failUnreachable  = "NodeUnreachable"
	failRefused      = "NodeRefuses"
	failBypassed     = "NodeBypassed" // kubelet is led past cri-proxy there
	failOutdated     = "ProxyOutdated"
	failPreparation  = "PreparationFailed"
	failPodEnded     = "PodEnded"
	failEndsJob      = "WouldEndJob"
	failDenied       = "AdmissionDenied"
	failRewritten    = "ImageRewritten"
	waitImagePull    = "ImagePullBackOff"
	waitInvalidImage = "InvalidImageName"
	waitNeverPull    = "ErrImageNeverPull"
	waitCrashLoop    = "CrashLoopBackOff"
)

const (
	// crashWithin: a container that ends sooner after its start than this is broken, whatever minReadySeconds says.
	crashWithin = 10 * time.Second
	// statusTimeout is how long the pod's status may lag: after that time a container with another ID counts as
	// the new one, even if the status does not name the new image.
	statusPatience = 15 * time.Second
)

// failure says why a pod does not reach its goal.
type failure struct{ reason, message string }

// PodFacts are what the controller knows of a pod and cannot read from the pod itself.
type knowledge struct {
	// begun is when the rollout took the goal up. Pods that were created later need no restart for it.
	begun time.Time
	// op is the node's operation that State names, restart the operation for the containers that keep their images.
	// asked says that the node has answered the question for op: if op is nil then, the node does not have it.
	op, restart *opsv1.Operation
	asked       bool
	// rested says that no node works any more on the restarts that State asks for, where State belongs to another goal.
	rested bool
	// failed says why the node could not prepare or restart anything, refused why it has not accepted the restart.
	failed, refused *failure
	// Updating says that the rollout changes the pod now, or is about to.
	turn bool
	// readySeen is when the controller first saw the present containers ready.
	readySeen time.Time
	// carried says that kubelet takes a new container for started because the old one was. StartedSeen is when the
	// controller first saw each container with a startupProbe running, by container ID.
	carried bool
	seen    map[string]time.Time
	// settled says that the pod was available after the change.
	settled bool
	// answers are the images that admission puts into this pod instead of the goal's.
	answers rewrites
	// Tags say what the tag of a container names now, by container.
	looks map[string]lookResult
	// more are the images that admission gives to other containers when the pod is changed.
	more map[string]string
	now  time.Time
}

// has returns true if the container has the wanted image, or the image that admission makes of the wanted one. State may be nil.
func (k knowledge) has(m *mark, container, have, want string) bool {
	if have == want || k.answers[container].covers(want, have) {
		return true
	}
	return m != nil && (m.Containers[container].covers(want, have) || m.There[container].covers(want, have))
}

// podRef is a pod with its State, its goal, and the facts about it.
type podRef struct {
	pod   *corev1.Pod
	mark  *mark
	goal  goal
	known knowledge
}

// PodStatus is how far a pod is, and what has to be done for it.
type verdict struct {
	stage stage
	// images and restarts have to be written into the pod: new images, and containers to restart.
	images   map[string]string
	restarts []string
	// CheckTags are the containers whose tag may name another image than the one that runs: the node has to be asked.
	looks []string
	// serving pods are ready and have started. Available pods have been serving for long enough. Nobody may count on
	// disrupted pods.
	serving, available, disrupted bool
	// open says that the pod's readiness gates have to be opened.
	open bool
	// ask: ask the node for the operation that State names. restart: have the node restart the containers of State.
	// inquire: ask the node whether it still restarts them for another goal.
	ask, restart, inquire bool
	// recovered pods are available after their change.
	recovered bool
	failure   failure
	// wait is how long until the status changes by the passing of time alone; 0 means never.
	wait time.Duration
}

func (v *verdict) fail(reason, format string, args ...any) {
	v.stage, v.failure = broken, failure{reason, fmt.Sprintf(format, args...)}
}

// Pod says how far an active pod is. It depends on nothing but its arguments.
func judge(pod *corev1.Pod, m *mark, g goal, k knowledge, s *strategy, now time.Time) verdict {
	var v verdict
	k.now = now
	shut, _ := shutBy(pod)
	v.available, v.wait = available(pod, k, s, now)
	ready := conditionOf(pod, corev1.PodReady)
	v.serving = ready != nil && ready.Status == corev1.ConditionTrue
	moving, wait := m.moving(pod, g, k)
	v.wait = sooner(v.wait, wait)
	v.inquire = moving && !m.by(g) && !k.rested && m.restarts(pod)
	v.disrupted = k.turn || shut != "" || moving
	if passed, _ := started(pod, k, now); v.serving && !passed {
		v.serving, v.disrupted = false, true // whatever its condition says
	}

	var made *mark // the State of another goal would tell what admission made of images at that time
	if m.by(g) {
		made = m
	}
	v.images = map[string]string{}
	for name, image := range g.images {
		c, _ := containerOf(pod, name)
		if c == nil {
			v.fail(failNoContainer, "%s", podLacks(pod, name, toChange))
			return v
		}
		switch {
		case !k.has(made, name, c.Image, image):
			v.images[name] = image
		case !m.by(g) && g.tags && !pod.CreationTimestamp.After(k.begun) && mayMove(pod, c):
			switch k.looks[name] {
			case unknown:
				v.looks = append(v.looks, name)
			case moved:
				v.restarts = append(v.restarts, name) // as kubelet would: it starts what the tag names now
			}
		}
	}
	slices.Sort(v.looks)
	if len(v.images) > 0 {
		for name, image := range k.more {
			if c, _ := containerOf(pod, name); c != nil && g.images[name] == "" && !k.has(made, name, c.Image, image) {
				v.images[name] = image // they change together, and go back together
			}
		}
	}
	for _, name := range g.restarts {
		c, _ := containerOf(pod, name)
		if c == nil {
			v.fail(failNoContainer, "%s", podLacks(pod, name, toRestart))
			return v
		}
		_, done := was{}, false
		if m.by(g) {
			_, done = m.Containers[name]
		}
		if !done && !pod.CreationTimestamp.After(k.begun) {
			v.restarts = append(v.restarts, name)
		}
	}
	switch {
	case len(v.images)+len(v.restarts)+len(v.looks) > 0:
		v.stage = outdated
		switch {
		case static(pod) != "":
			v.fail(failStatic, "%s", static(pod))
		case k.failed != nil:
			v.fail(k.failed.reason, "%s", k.failed.message)
			v.open = shut == g.rollout
			v.disrupted = shut != "" || moving
		}
		return v
	case !m.by(g):
		v.stage = updated
		v.open = shut == g.rollout && !moving // shut for a change that is not wanted any more
		v.judgeCreated(pod, k, s, now)
		return v
	}
	v.judgeChanged(pod, m, g, k, s, moving, now)
	return v
}

// podLacks says in words that a pod has no such container.
func podLacks(pod *corev1.Pod, name, change string) string {
	return lacks("pod "+pod.Name, name, change, containersOf(pod))
}

// static says in words that a pod is a static pod; empty for other pods.
func static(pod *corev1.Pod) string {
	if !mirrorpod.Is(pod) {
		return ""
	}
	return fmt.Sprintf("pod %s is a static pod, which is changed on its node only: for another image change its manifest on node %s, "+
		"to restart its containers make a ContainerRecreateRequest for it", pod.Name, pod.Spec.NodeName)
}

// judgeChanged completes the status of a pod that was changed for the goal.
func (v *verdict) judgeChanged(pod *corev1.Pod, m *mark, g goal, k knowledge, s *strategy, moving bool, now time.Time) {
	v.stage = changing
	v.ask = !k.asked && m.Operation != ""
	if moving {
		v.restart = k.restart == nil && m.restarts(pod)
		if k.restart.GetFinishTime() != nil && k.restart.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			// The node has left the old container as it was: the pod is what it was.
			shut, _ := shutBy(pod)
			v.fail(failRestart, "%s", accountOf(k.restart))
			v.open, v.disrupted = shut == g.rollout, shut != ""
			return
		}
		if why := k.refused; why != nil && k.restart == nil && m.restarts(pod) {
			v.fail(why.reason, "%s", why.message)
			if why.reason != failUnreachable { // else it may be at work
				shut, _ := shutBy(pod)
				v.open, v.disrupted = shut == g.rollout, shut != ""
			}
			return
		}
	} else {
		ready, wait := containersReady(pod, k, s, now)
		v.wait = sooner(v.wait, wait)
		shut, _ := shutBy(pod)
		v.open = ready && shut == g.rollout
		if k.settled || v.available && shut == "" {
			v.stage, v.recovered, v.disrupted, v.ask = updated, v.available, k.turn && !v.available, false
			return
		}
		if wasReady(pod, m, k) {
			v.stage, v.ask = updated, false // whatever it suffers from came later
			return
		}
	}
	if why := brokenContainer(pod, m, s); why != nil {
		v.fail(why.reason, "%s", why.message)
	} else if left := m.Time.Add(s.deadline).Sub(now); left <= 0 {
		v.fail(failDeadline, "pod %s is not available %s after its change%s", pod.Name, s.deadline, waitingFor(pod))
	} else {
		v.wait = sooner(v.wait, left)
	}
}

// judgeCreated completes the status of a pod that has what it should have without any change. If it was created since the rollout
// began and does not come up, the rollout is at fault.
func (v *verdict) judgeCreated(pod *corev1.Pod, k knowledge, s *strategy, now time.Time) {
	if v.available || k.settled || !pod.CreationTimestamp.After(k.begun) || pod.Spec.NodeName == "" {
		return
	}
	if why := brokenContainer(pod, nil, s); why != nil && why.reason != failExited {
		v.fail(why.reason, "%s", why.message)
	} else if left := pod.CreationTimestamp.Add(s.deadline).Sub(now); left <= 0 {
		v.fail(failDeadline, "pod %s is not available %s after its creation%s", pod.Name, s.deadline, waitingFor(pod))
	} else {
		v.wait = sooner(v.wait, left)
	}
}

// moving returns true if a container of the state may still be replaced. wait is how long until time alone decides that.
func (m *mark) moving(pod *corev1.Pod, g goal, k knowledge) (moving bool, wait time.Duration) {
	if m == nil {
		return false, 0
	}
	for name, w := range m.Containers {
		c, _ := containerOf(pod, name)
		if c == nil || replaced(pod, m, name, w, c.Image, k) {
			continue
		}
		left := time.Duration(0)
		if !m.by(g) {
			var settled bool
			if settled, left = m.settled(pod, name, w, c.Image, k); settled {
				continue
			}
		}
		moving, wait = true, max(wait, left)
	}
	return moving, wait
}

// settled is about a container that was not replaced, though the state of another goal says that it should be. It returns true if
// nobody will replace it for that goal any more. Kubelet still brings what runs to the spec.
func (m *mark) settled(pod *corev1.Pod, name string, w was, image string, k knowledge) (is bool, wait time.Duration) {
	cs := statusOf(pod, name)
	switch {
	case cs == nil || cs.ContainerID == "":
		return false, 0 // the pod is not available anyway
	case cs.ContainerID != w.ID:
		// Another container of the same image. If the old one crashed just before the patch, kubelet replaces this one within the timeout.
		left := statusPatience - k.now.Sub(m.Time.Time)
		return left <= 0, max(left, 0)
	case image != w.Image:
		return false, 0 // kubelet has not acted yet
	}
	return k.rested, 0
}

// restarts returns true if a container of the state that keeps its image is still the old one.
func (m *mark) restarts(pod *corev1.Pod) bool {
	for name, w := range m.Containers {
		if c, _ := containerOf(pod, name); c != nil && c.Image == w.Image {
			if cs := statusOf(pod, name); cs != nil && cs.ContainerID == w.ID {
				return true
			}
		}
	}
	return false
}

// replaced returns true if the pod's status shows the container that was made for the change.
func replaced(pod *corev1.Pod, m *mark, name string, w was, image string, k knowledge) bool {
	cs := statusOf(pod, name)
	if cs == nil || cs.ContainerID == "" {
		return false
	}
	if cs.ContainerID == w.ID {
		// The change was taken back before kubelet acted on it: there is nothing to replace.
		return w.Base == image && w.Image != image && cs.State.Running != nil && sameImage(cs.Image, image) && k.now.Sub(m.Time.Time) >= statusPatience
	}
	if w.Image == image || w.ImageID != "" && cs.ImageID != "" && cs.ImageID != w.ImageID || sameImage(cs.Image, image) {
		return true
	}
	if m.Operation == "" {
		// The status may name the same content by the name of the old image.
		return cs.State.Running == nil || w.ID != "" || cs.State.Running.StartedAt.After(m.Time.Add(statusPatience))
	}
	// If the old container crashed between the last look at it and the patch, the ID differs, too. The node knows which one it is.
	for _, c := range k.op.GetContainers() {
		if c.GetName() == name && c.GetSuccessorId() != "" && c.GetSuccessorId() == bareID(cs.ContainerID) {
			return true
		}
	}
	return k.asked && (k.op == nil || k.op.GetFinishTime() != nil)
}

// sameImage returns true if two references, as people write them, are the same.
func sameImage(a, b string) bool {
	x, err1 := reference.ParseDockerRef(a)
	y, err2 := reference.ParseDockerRef(b)
	return err1 == nil && err2 == nil && x.String() == y.String()
}

// brokenContainer finds a container that will not get ready, or has ended too soon. If the state is nil it looks at all containers.
func brokenContainer(pod *corev1.Pod, m *mark, s *strategy) *failure {
	names := containersOf(pod)
	if m != nil {
		names = names[:0]
		for name := range m.Containers {
			names = append(names, name)
		}
		slices.Sort(names)
	}
	for _, name := range names {
		cs := statusOf(pod, name)
		if cs == nil {
			continue
		}
		if w := cs.State.Waiting; w != nil {
			// The status may still show what the old container waited for.
			c, _ := containerOf(pod, name)
			switch {
			case w.Reason == waitCrashLoop && (m == nil || cs.ContainerID != m.Containers[name].ID),
				slices.Contains([]string{waitImagePull, waitInvalidImage, waitNeverPull}, w.Reason) && c != nil && strings.Contains(w.Message, c.Image):
				return &failure{w.Reason, fmt.Sprintf("container %s: %s", name, w.Message)}
			}
		}
		if m == nil {
			continue
		}
		old := m.Containers[name].ID
		if t := cs.State.Terminated; t != nil && cs.ContainerID != old {
			return &failure{failExited, fmt.Sprintf("container %s: the new one ended (exit code %d, %s)", name, t.ExitCode, t.Reason)}
		}
		if t := cs.LastTerminationState.Terminated; t != nil && cs.ContainerID != old && t.ContainerID != "" && t.ContainerID != old && !t.StartedAt.Time.Before(m.Time.Truncate(time.Second)) &&
			t.FinishedAt.Sub(t.StartedAt.Time) < max(s.minReady, crashWithin) {
			return &failure{failCrashed, fmt.Sprintf("container %s: the new one ended after %s (exit code %d, %s)", name, t.FinishedAt.Sub(t.StartedAt.Time).Round(time.Second), t.ExitCode, t.Reason)}
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

// available returns true if the pod has been ready for long enough. The duration is how long that still takes.
func available(pod *corev1.Pod, k knowledge, s *strategy, now time.Time) (bool, time.Duration) {
	ready := conditionOf(pod, corev1.PodReady)
	if ready == nil || ready.Status != corev1.ConditionTrue {
		return false, 0
	}
	if passed, wait := started(pod, k, now); !passed {
		return false, wait
	}
	if len(gatesOf(pod)) > 0 {
		return containersReady(pod, k, s, now) // the gate may have been opened only now
	}
	return readyLongEnough(pod, ready, k, s, now)
}

// containersReady returns true if the containers alone have been ready for long enough.
func containersReady(pod *corev1.Pod, k knowledge, s *strategy, now time.Time) (bool, time.Duration) {
	ready := conditionOf(pod, corev1.ContainersReady)
	if ready == nil || ready.Status != corev1.ConditionTrue {
		return false, 0
	}
	if passed, wait := started(pod, k, now); !passed {
		return false, wait
	}
	return readyLongEnough(pod, ready, k, s, now)
}

// started returns true if all containers of a pod have passed their startupProbes. wait is how long until time alone may show it.
func started(pod *corev1.Pod, k knowledge, now time.Time) (passed bool, wait time.Duration) {
	passed = true
	for _, c := range startupProbed(pod) {
		cs := statusOf(pod, c.Name)
		if cs == nil {
			continue // the conditions tell
		}
		ok, left := controller.StartupPassed(c, cs, k.seen[cs.ContainerID], k.carried, now)
		passed, wait = passed && ok, max(wait, left)
	}
	return passed, wait
}

func readyLongEnough(pod *corev1.Pod, ready *corev1.PodCondition, k knowledge, s *strategy, now time.Time) (bool, time.Duration) {
	if s.minReady == 0 {
		return true, 0
	}
	since := ready.LastTransitionTime.Time
	for _, c := range pod.Status.ContainerStatuses {
		if r := c.State.Running; r != nil && r.StartedAt.After(since) {
			since = r.StartedAt.Time // so short a gap that readiness did not notice
		}
	}
	// A node whose clock is ahead must not make the wait longer than it is.
	if !k.readySeen.IsZero() && k.readySeen.Before(since) {
		since = k.readySeen
	}
	left := since.Add(s.minReady).Sub(now)
	return left <= 0, max(left, 0)
}

// wasReady returns true if the pod, which is not ready now, was ready for a while after its change.
func wasReady(pod *corev1.Pod, m *mark, k knowledge) bool {
	ready := conditionOf(pod, corev1.ContainersReady)
	if ready == nil || ready.Status != corev1.ConditionFalse {
		return false
	}
	since := m.Time.Time
	for name := range m.Containers {
		cs := statusOf(pod, name)
		if cs == nil || cs.State.Running == nil {
			continue
		}
		if cs.State.Running.StartedAt.After(since) {
			since = cs.State.Running.StartedAt.Time
		}
		c, _ := containerOf(pod, name)
		if passed, _ := controller.StartupPassed(c, cs, time.Time{}, false, k.now); !passed {
			return false // what made the pod ready was the start of the old one
		}
		if _, left := controller.StartupPassed(c, cs, time.Time{}, k.carried, since); left > 0 {
			since = since.Add(left) // until then, too
		}
	}
	return ready.LastTransitionTime.After(since.Add(crashWithin))
}

// culprit returns the container for which an operation failed; nil if there is none.
func culprit(op *opsv1.Operation) *opsv1.ContainerOperation {
	var found *opsv1.ContainerOperation
	for _, c := range op.GetContainers() {
		if c.GetPhase() == opsv1.Phase_PHASE_FAILED || c.GetPhase() == opsv1.Phase_PHASE_CANCELLED {
			if found == nil || found.GetReason() == reasonOther {
				found = c
			}
		}
	}
	return found
}

// accountOf says in words why an operation failed.
func accountOf(op *opsv1.Operation) string {
	c := culprit(op)
	switch {
	case c == nil:
		return op.GetMessage()
	case c.GetMessage() == "":
		return fmt.Sprintf("container %s: %s", c.GetName(), c.GetPull().GetMessage())
	}
	return fmt.Sprintf("container %s: %s", c.GetName(), controller.Account(c))
}

// reasonOther is the node's word for a container that would have been all right.
const reasonOther = "OtherContainerFailed"
