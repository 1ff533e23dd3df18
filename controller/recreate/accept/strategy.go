// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package accept

import (
	"time"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// Strategy is what applies to one container: the request's strategy, overridden by the container's.
type Strategy struct {
	IgnoreFailure bool
	Ordered       bool
	Force         bool
	// Grace in seconds; nil means the pod's own.
	Grace *int64
	// Unready is how long the pod is out of service before the stop; nil means it stays in service.
	Unready    *time.Duration
	MinStarted time.Duration
	// StartFirst and Parallel are the request's alone.
	StartFirst, Parallel bool
}

// StrategyOf returns the strategy of a container, without StartFirst and Parallel.
func StrategyOf(
	request *appsv1alpha1.ContainerRecreateRequestStrategy,
	container *appsv1alpha1.ContainerRecreateRequestContainerStrategy,
) Strategy {
	var s Strategy
	seconds := func(n *int64) *time.Duration {
		d := time.Duration(*n) * time.Second
		return &d
	}
	if r := request; r != nil {
		s.IgnoreFailure = r.FailurePolicy == appsv1alpha1.ContainerRecreateRequestFailurePolicyIgnore
		s.Ordered, s.Force = r.OrderedRecreate, r.ForceRecreate
		s.Grace = r.TerminationGracePeriodSeconds
		s.MinStarted = time.Duration(r.MinStartedSeconds) * time.Second
		if r.UnreadyGracePeriodSeconds != nil {
			s.Unready = seconds(r.UnreadyGracePeriodSeconds)
		}
	}
	if c := container; c != nil {
		if c.FailurePolicy != "" {
			s.IgnoreFailure = c.FailurePolicy == appsv1alpha1.ContainerRecreateRequestFailurePolicyIgnore
		}
		if c.OrderedRecreate != nil {
			s.Ordered = *c.OrderedRecreate
		}
		if c.ForceRecreate != nil {
			s.Force = *c.ForceRecreate
		}
		if c.TerminationGracePeriodSeconds != nil {
			s.Grace = c.TerminationGracePeriodSeconds
		}
		if c.UnreadyGracePeriodSeconds != nil {
			s.Unready = seconds(c.UnreadyGracePeriodSeconds)
		}
		if c.MinStartedSeconds != nil {
			s.MinStarted = time.Duration(*c.MinStartedSeconds) * time.Second
		}
	}
	return s
}
