// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// startedSlack is how long after a probe's periodSeconds kubelet has certainly found out whether
// the container has started. kubelet looks at the runtime every second (pkg/kubelet/pleg). It cuts
// startedAt to the second (status_manager.go normalizeStatus). It takes a container for old enough
// a second too early (worker.go doProbe: int32 of a negative number of seconds rounds towards
// zero). And the status has to get here.
const startedSlack = 4 * time.Second

// maxHold is the longest hold_probes that a node accepts.
const maxHold = time.Hour

// startedCarried is the first version of kubelet that takes a new container for started because the
// container before it was.
var startedCarried = version.MajorMinor(1, 35) //nolint:gochecknoglobals // a constant

// CarriesStarted says that the kubelet of a node takes a container for started because the
// container before it was. It says so too for a nil node and for a node that does not tell its
// version.
func CarriesStarted(node *corev1.Node) bool {
	if node == nil {
		return true
	}
	v, err := version.ParseGeneric(node.Status.NodeInfo.KubeletVersion)
	return err != nil || v.AtLeast(startedCarried)
}

// HoldProbes returns for how long a node must keep kubelet from probing a new container c: until
// kubelet's startup worker has looked at c once. Nil means not at all. carried is what
// [CarriesStarted] says.
func HoldProbes(c *corev1.Container, carried bool) *durationpb.Duration {
	if c == nil || c.StartupProbe == nil || !carried {
		return nil
	}
	return durationpb.New(min(startupPeriod(c)+startedSlack, maxHold))
}

// StartupPassed says whether container c has passed its startupProbe, as its status in the pod
// tells. wait is how long until the passing of time alone makes the status believable.
//
// kubelet since 1.35 copies `started: true` from one container to the next when it finds the new
// one running where the old one ran (kubelet_pods.go convertToAPIContainerStatuses;
// prober_manager.go isContainerStarted believes it). An adopted restart and any new image look like
// that. The copy lasts until the startup worker's next tick, up to periodSeconds later. The worker
// then sets the result of the new ID to Unknown (worker.go doProbe), and started to false
// (kubelet.go syncLoopIteration, status_manager.go SetContainerStartup). So a status from before
// that tick says nothing. The time counts from startedAt, or from firstSeen if that was before: a
// node that holds probes shows a startedAt in the future, and the node's clock may be ahead.
//
// The first container of its name has nothing to copy from.
func StartupPassed(
	c *corev1.Container, s *corev1.ContainerStatus, firstSeen time.Time, carried bool, now time.Time,
) (passed bool, wait time.Duration) {
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

// startupPeriod is the period of the startupProbe.
func startupPeriod(c *corev1.Container) time.Duration {
	if n := c.StartupProbe.PeriodSeconds; n > 0 {
		return time.Duration(n) * time.Second
	}
	return 10 * time.Second // the API's default
}
