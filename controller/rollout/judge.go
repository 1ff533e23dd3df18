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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// stage is where a pod stands on its way to a goal.
type stage int

const (
	// outdated: something is still to be written into the pod.
	outdated stage = iota
	// changing: it is written, and not there yet.
	changing
	// updated: the pod runs what it should. It need not be available.
	updated
	// broken: it will not get there by itself.
	broken
	// left: it would take more than images to get it there, so it is left to its workload.
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
	// crashWithin is how soon after its start a container must have ended to count as broken, whatever minReadySeconds says.
	crashWithin = 10 * time.Second
	// statusPatience is how long a container of another ID may run in a pod whose status does not tell the image.
	statusPatience = 15 * time.Second
)

// failure is why a pod does not get to its goal.
type failure struct{ reason, message string }

// knowledge is what is known of a pod besides the pod.
type knowledge struct {
	// begun is when the rollout took the goal up: pods made later are as the goal wants them to be restarted.
	begun time.Time
	// op is the operation of the mark, if asked says so; restart is that of the containers that are restarted only.
	op, restart *opsv1.Operation
	asked       bool
	// rested says that no node is at work on the restarts of the mark, seen when that is another goal's.
	rested bool
	// failed is why nothing could be prepared, or restarted; refused why no node has taken the restart up.
	failed, refused *failure
	// turn says that the pod is being changed, or about to be.
	turn bool
	// readySeen is when the containers as they are were first seen ready.
	readySeen time.Time
	// carried says that kubelet takes new containers for started because the old ones were, seen when those that have a startupProbe were
	// first seen running, by container ID.
	carried bool
	seen    map[string]time.Time
	// settled says that the pod has been available after the change.
	settled bool
	// answers are what the API server makes of images in this pod.
	answers rewrites
	// looks are what nodes have found their tags to name, by container.
	looks map[string]lookResult
	// more are the images that it gives other containers when the pod is changed.
	more map[string]string
	now  time.Time
}

// has says that a container has the image that is wanted, or what admission makes of it. The mark may be nil.
func (k knowledge) has(m *mark, container, have, want string) bool {
	if have == want || k.answers[container].covers(want, have) {
		return true
	}
	return m != nil && (m.Containers[container].covers(want, have) || m.There[container].covers(want, have))
}

// verdict is where a pod stands.
type verdict struct {
	stage stage
	// images and restarts are what is to be written.
	images   map[string]string
	restarts []string
	// looks are the containers of which the node is to say whether their tag names another image than the one that runs.
	looks []string
	// serving says that the pod is ready and has started, available that it has been for long enough, disrupted that it must not be counted on.
	serving, available, disrupted bool
	// open says that its gates are to be opened.
	open bool
	// ask says that the operation of the mark is worth asking for, restart that the marked containers are to be restarted, inquire that it
	// is worth asking whether a node still restarts them for another goal.
	ask, restart, inquire bool
	// recovered says that the pod is available after a change.
	recovered bool
	failure   failure
	// wait is how long until the passing of time alone changes the verdict; 0 means never.
	wait time.Duration
}

func (v *verdict) fail(reason, format string, args ...any) {
	v.stage, v.failure = broken, failure{reason, fmt.Sprintf(format, args...)}
}

// judge says where an active pod stands. It depends on nothing but its arguments.
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

	var made *mark // of another goal it says what admission made of images then
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

// podLacks says that a pod has no such container.
func podLacks(pod *corev1.Pod, name, change string) string {
	return lacks("pod "+pod.Name, name, change, containersOf(pod))
}

// static says that a pod is a static one; empty when it is none.
func static(pod *corev1.Pod) string {
	if !mirrorpod.Is(pod) {
		return ""
	}
	return fmt.Sprintf("pod %s is a static pod, which is changed on its node only: for another image change its manifest on node %s, "+
		"to restart its containers make a ContainerRecreateRequest for it", pod.Name, pod.Spec.NodeName)
}

// judgeChanged is about a pod that was changed for the goal.
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

// judgeCreated is about a pod that was made as it should be, or was so before: if that was since the rollout began and it does
// not come up, the rollout is at fault.
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

// moving says that a container of the mark is not replaced yet, and may be; wait is how long until the passing of time alone settles it.
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

// settled says of a container that was not replaced, by the mark of a goal which nobody works for any more, that it will not be by that:
// it is what the pod is now. It never changes that kubelet brings what runs to the spec.
func (m *mark) settled(pod *corev1.Pod, name string, w was, image string, k knowledge) (is bool, wait time.Duration) {
	cs := statusOf(pod, name)
	switch {
	case cs == nil || cs.ContainerID == "":
		return false, 0 // it is not available anyway
	case cs.ContainerID != w.ID:
		// Another one of the same image. If that was a crash just before the patch, kubelet has replaced it by then.
		left := statusPatience - k.now.Sub(m.Time.Time)
		return left <= 0, max(left, 0)
	case image != w.Image:
		return false, 0 // kubelet has not acted yet
	}
	return k.rested, 0
}

// restarts says that a container of the mark that keeps its image is still the old one.
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

// replaced says that the pod's status shows the container that belongs to the change.
func replaced(pod *corev1.Pod, m *mark, name string, w was, image string, k knowledge) bool {
	cs := statusOf(pod, name)
	if cs == nil || cs.ContainerID == "" {
		return false
	}
	if cs.ContainerID == w.ID {
		// Taken back before kubelet had acted on it: there is nothing to replace.
		return w.Base == image && w.Image != image && cs.State.Running != nil && sameImage(cs.Image, image) && k.now.Sub(m.Time.Time) >= statusPatience
	}
	if w.Image == image || w.ImageID != "" && cs.ImageID != "" && cs.ImageID != w.ImageID || sameImage(cs.Image, image) {
		return true
	}
	if m.Operation == "" {
		// Its name is that of the same content under another one.
		return cs.State.Running == nil || w.ID != "" || cs.State.Running.StartedAt.After(m.Time.Add(statusPatience))
	}
	// A crash of the old container between a look at it and the patch leaves another ID, too: the node knows.
	for _, c := range k.op.GetContainers() {
		if c.GetName() == name && c.GetSuccessorId() != "" && c.GetSuccessorId() == bareID(cs.ContainerID) {
			return true
		}
	}
	return k.asked && (k.op == nil || k.op.GetFinishTime() != nil)
}

// sameImage compares references as people write them.
func sameImage(a, b string) bool {
	x, err1 := reference.ParseDockerRef(a)
	y, err2 := reference.ParseDockerRef(b)
	return err1 == nil && err2 == nil && x.String() == y.String()
}

// brokenContainer finds a container that will not get ready, or has ended too soon. Without a mark all containers are looked at.
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
			// What the old container waited for may still be shown.
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

// waitingFor says what keeps a pod from being available.
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

// available says whether the pod is ready, and has been for long enough; wait is how long until it has.
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

// containersReady says the same of the containers alone.
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

// started says whether all containers of a pod have passed their startupProbes; wait is how long until the passing of time alone may show it.
func started(pod *corev1.Pod, k knowledge, now time.Time) (passed bool, wait time.Duration) {
	passed = true
	for _, c := range startupProbed(pod) {
		cs := statusOf(pod, c.Name)
		if cs == nil {
			continue // the conditions tell
		}
		ok, left := pods.StartupPassed(c, cs, k.seen[cs.ContainerID], k.carried, now)
		passed, wait = passed && ok, max(wait, left)
	}
	return passed, wait
}

// startupProbed are the containers with a startupProbe that run at the same time as the others.
func startupProbed(pod *corev1.Pod) []*corev1.Container {
	var probed []*corev1.Container
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].StartupProbe == nil {
				continue
			}
			if c, _ := containerOf(pod, list[i].Name); c != nil {
				probed = append(probed, c)
			}
		}
	}
	return probed
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

// wasReady says that the pod, which is not ready, was so for a while after its change.
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
		if passed, _ := pods.StartupPassed(c, cs, time.Time{}, false, k.now); !passed {
			return false // what made the pod ready was the start of the old one
		}
		if _, left := pods.StartupPassed(c, cs, time.Time{}, k.carried, since); left > 0 {
			since = since.Add(left) // until then, too
		}
	}
	return ready.LastTransitionTime.After(since.Add(crashWithin))
}

// containersOf are the names of containers that can be changed in place.
func containersOf(pod *corev1.Pod) []string {
	var names []string
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if c, _ := containerOf(pod, list[i].Name); c != nil {
				names = append(names, c.Name)
			}
		}
	}
	return names
}

// culprit is the container for which an operation failed, nil without.
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

// accountOf is what an operation says of its failure.
func accountOf(op *opsv1.Operation) string {
	c := culprit(op)
	switch {
	case c == nil:
		return op.GetMessage()
	case c.GetMessage() == "":
		return fmt.Sprintf("container %s: %s", c.GetName(), c.GetPull().GetMessage())
	}
	return fmt.Sprintf("container %s: %s", c.GetName(), nodes.Account(c))
}

// idsOf are the container IDs that an operation is to find, and says whether all of the containers run.
func idsOf(pod *corev1.Pod, names []string) (ids map[string]string, running bool) {
	ids, running = map[string]string{}, pod.Spec.NodeName != ""
	for _, name := range names {
		cs := statusOf(pod, name)
		if cs == nil || cs.State.Running == nil || cs.ContainerID == "" {
			running = false
			continue
		}
		ids[name] = cs.ContainerID
	}
	return ids, running
}

// stamp is now in the resolution of the API, rounded up: what is to last is never too short.
func stamp(now time.Time) metav1.Time {
	return metav1.NewTime(now.Add(time.Second - 1).Truncate(time.Second))
}

// sooner is the smaller of two waits of which 0 means never.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}
