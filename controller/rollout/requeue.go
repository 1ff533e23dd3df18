// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"time"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// options returns the options of a controller. A request that fails is tried again after 50 ms, later every 30 s.
func options(workers int) controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: workers,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second),
	}
}

// rolloutChanges leaves out statuses, which the controller itself writes.
func rolloutChanges() predicate.Predicate {
	return predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{})
}

const (
	// StaleInterval is how long to wait for the cache to catch up.
	stalePause = 100 * time.Millisecond
	// BlockedInterval is how often to look at budgets and workloads that hold a rollout back.
	blockedPause = 2 * time.Second
	// ResyncPeriod is how often to look at a rollout that is not over, even without an event.
	lookAgain = 30 * time.Second
)
