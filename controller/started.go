// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// startedSlack is how much later than periodSeconds after a container is shown kubelet has certainly found out for itself whether the container has
// started: it looks at the runtime every second (pkg/kubelet/pleg), startedAt in a status is cut to the second (status_manager.go
// normalizeStatus), a container counts as old enough a second too early (worker.go doProbe: int32 of a negative number of seconds is rounded
// towards zero), and the status has to get here.
const startedSlack = 4 * time.Second

// maxHold is what a node accepts as hold_probes.
const maxHold = time.Hour

// startedCarried is the first kubelet that takes a new container for started because the one before was.
var startedCarried = version.MajorMinor(1, 35) //nolint:gochecknoglobals // a constant

// CarriesStarted says that the kubelet of a node takes a container for started because the one before it was. A node that is nil, or that does
// not tell its version, is taken for one that does.
func CarriesStarted(node *corev1.Node) bool {
	if node == nil {
		return true
	}
	v, err := version.ParseGeneric(node.Status.NodeInfo.KubeletVersion)
	return err != nil || v.AtLeast(startedCarried)
}

// HoldProbes is for how long a node must keep kubelet from probing a new container c, nil for not at all: until its startup worker has
// looked at it once. carried is what [CarriesStarted] says.
func HoldProbes(c *corev1.Container, carried bool) *durationpb.Duration {
	if c == nil || c.StartupProbe == nil || !carried {
		return nil
	}
	return durationpb.New(min(startupPeriod(c)+startedSlack, maxHold))
}

// StartupPassed says whether container c has passed its startupProbe, as its status in the pod tells, and if the passing of time alone can
// make it believable, how long that takes.
//
// A kubelet since 1.35 copies `started: true` from one container to the next when it finds the one running where the other ran
// (kubelet_pods.go convertToAPIContainerStatuses; prober_manager.go isContainerStarted believes it), which is what an adopted restart and any
// new image look like. That lasts until the startup worker's next tick, up to periodSeconds later: it then sets the result of the new ID to
// Unknown (worker.go doProbe), and started to false (kubelet.go syncLoopIteration, status_manager.go SetContainerStartup). So what was read
// before that says nothing. The moment is counted from startedAt, or from when the container was first seen running, if that was before:
// a node that holds probes shows a startedAt that is to come, and its clock may be ahead.
//
// A container that is the first of its name has nothing to take over.
func StartupPassed(c *corev1.Container, s *corev1.ContainerStatus, firstSeen time.Time, carried bool, now time.Time) (passed bool, wait time.Duration) {
	switch {
	case c == nil || c.StartupProbe == nil:
		return true, 0
	case s == nil || s.State.Running == nil || s.Started == nil || !*s.Started:
		return false, 0
	case !carried || s.RestartCount == 0:
		return true, 0
	}
	since := s.State.Running.StartedAt.Time
	if !firstSeen.IsZero() && firstSeen.Before(since) {
		since = firstSeen
	}
	left := since.Add(startupPeriod(c) + startedSlack).Sub(now)
	return left <= 0, max(left, 0)
}

// startupPeriod is how often the startupProbe is due.
func startupPeriod(c *corev1.Container) time.Duration {
	if n := c.StartupProbe.PeriodSeconds; n > 0 {
		return time.Duration(n) * time.Second
	}
	return 10 * time.Second // the API's default
}
