// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// available returns true if the pod has been ready for long enough. The duration is how long that
// still takes.
func available(pod *corev1.Pod, k PodFacts, s *Strategy, now time.Time) (bool, time.Duration) {
	if len(Gates(pod)) > 0 && isTrue(pods.Condition(pod, corev1.PodReady)) {
		return containersReady(pod, k, s, now) // the gate may have been opened only now
	}
	return readyLongEnough(pod, corev1.PodReady, k, s, now)
}

// containersReady returns true if the containers alone have been ready for long enough.
func containersReady(pod *corev1.Pod, k PodFacts, s *Strategy, now time.Time) (bool, time.Duration) {
	return readyLongEnough(pod, corev1.ContainersReady, k, s, now)
}

func isTrue(c *corev1.PodCondition) bool { return c != nil && c.Status == corev1.ConditionTrue }

// started returns true if all containers of a pod have passed their startupProbes. wait is how long
// until time alone may show it.
func started(pod *corev1.Pod, k PodFacts, now time.Time) (passed bool, wait time.Duration) {
	passed = true
	for _, c := range StartupProbed(pod) {
		cs := pods.Status(pod, c.Name)
		if cs == nil {
			continue // the conditions tell
		}
		ok, left := pods.StartupPassed(c, cs, k.StartedSeen[cs.ContainerID], k.Carried, now)
		passed, wait = passed && ok, max(wait, left)
	}
	return passed, wait
}

// readyLongEnough returns true if a condition of the pod has been true for long enough, and all
// containers have started.
func readyLongEnough(
	pod *corev1.Pod, kind corev1.PodConditionType, k PodFacts, s *Strategy, now time.Time,
) (bool, time.Duration) {
	ready := pods.Condition(pod, kind)
	if !isTrue(ready) {
		return false, 0
	}
	if passed, wait := started(pod, k, now); !passed {
		return false, wait
	}
	if s.MinReady == 0 {
		return true, 0
	}
	since := ready.LastTransitionTime.Time
	for _, c := range pod.Status.ContainerStatuses {
		if r := c.State.Running; r != nil && r.StartedAt.After(since) {
			since = r.StartedAt.Time // so short a gap that readiness did not notice
		}
	}
	// A node whose clock is ahead must not make the wait longer than it is.
	if !k.ReadySeen.IsZero() && k.ReadySeen.Before(since) {
		since = k.ReadySeen
	}
	left := since.Add(s.MinReady).Sub(now)
	return left <= 0, max(left, 0)
}

// wasReady returns true if the pod, which is not ready now, was ready for a while after its change.
func wasReady(pod *corev1.Pod, m *InPlaceState, k PodFacts) bool {
	ready := pods.Condition(pod, corev1.ContainersReady)
	if ready == nil || ready.Status != corev1.ConditionFalse {
		return false
	}
	since := m.Time.Time
	for name := range m.Containers {
		cs := pods.Status(pod, name)
		if cs == nil || cs.State.Running == nil {
			continue
		}
		if cs.State.Running.StartedAt.After(since) {
			since = cs.State.Running.StartedAt.Time
		}
		c := pods.Changeable(pod, name)
		if passed, _ := pods.StartupPassed(c, cs, time.Time{}, false, k.now); !passed {
			return false // what made the pod ready was the start of the old one
		}
		if _, left := pods.StartupPassed(c, cs, time.Time{}, k.Carried, since); left > 0 {
			since = since.Add(left) // until then, too
		}
	}
	return ready.LastTransitionTime.After(since.Add(crashWithin))
}
