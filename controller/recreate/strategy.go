// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"time"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// strategy is what applies to one container: the request's strategy, overridden by the container's.
type strategy struct {
	ignoreFailure bool
	ordered       bool
	force         bool
	// grace in seconds; nil means the pod's own.
	grace *int64
	// unready is how long the pod is out of service before the stop; nil means it stays in service.
	unready    *time.Duration
	minStarted time.Duration
	// startFirst and parallel are the request's alone.
	startFirst, parallel bool
}

func strategyOf(
	request *appsv1alpha1.ContainerRecreateRequestStrategy,
	container *appsv1alpha1.ContainerRecreateRequestContainerStrategy,
) strategy {
	var s strategy
	seconds := func(n *int64) *time.Duration {
		d := time.Duration(*n) * time.Second
		return &d
	}
	if r := request; r != nil {
		s.ignoreFailure = r.FailurePolicy == appsv1alpha1.ContainerRecreateRequestFailurePolicyIgnore
		s.ordered, s.force = r.OrderedRecreate, r.ForceRecreate
		s.grace = r.TerminationGracePeriodSeconds
		s.minStarted = time.Duration(r.MinStartedSeconds) * time.Second
		if r.UnreadyGracePeriodSeconds != nil {
			s.unready = seconds(r.UnreadyGracePeriodSeconds)
		}
	}
	if c := container; c != nil {
		if c.FailurePolicy != "" {
			s.ignoreFailure = c.FailurePolicy == appsv1alpha1.ContainerRecreateRequestFailurePolicyIgnore
		}
		if c.OrderedRecreate != nil {
			s.ordered = *c.OrderedRecreate
		}
		if c.ForceRecreate != nil {
			s.force = *c.ForceRecreate
		}
		if c.TerminationGracePeriodSeconds != nil {
			s.grace = c.TerminationGracePeriodSeconds
		}
		if c.UnreadyGracePeriodSeconds != nil {
			s.unready = seconds(c.UnreadyGracePeriodSeconds)
		}
		if c.MinStartedSeconds != nil {
			s.minStarted = time.Duration(*c.MinStartedSeconds) * time.Second
		}
	}
	return s
}
