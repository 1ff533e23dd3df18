// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package requeue says when rollouts are looked at again: by which events, how often without any,
// and after an error.
package requeue

import (
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// Options returns the options of a controller. A request that fails is tried again after 50 ms,
// later every 30 s.
func Options(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		RateLimiter:             retry.RateLimiter(),
	}
}

// RolloutChanges leaves out statuses, which the controller itself writes.
func RolloutChanges() predicate.Predicate {
	return predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{})
}

const (
	// StaleInterval is how long to wait for the cache to catch up.
	StaleInterval = 100 * time.Millisecond
	// BlockedInterval is how often to look at budgets and workloads that hold a rollout back.
	BlockedInterval = 2 * time.Second
	// ResyncPeriod is how often to look at a rollout that is not over, even without an event.
	ResyncPeriod = 30 * time.Second
)
