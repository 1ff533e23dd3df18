// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"sync"

	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// The bed of the tests runs the reconciler without a manager, in a synctest bubble. It connects
// what SetupWithManager connects, by the methods below.

// GatherInterval is how long the events of nodes and pods are collected.
const GatherInterval = gatherInterval

// Prepare is what SetupWithManager does first.
func (r *Reconciler) Prepare() { r.prepare() }

// Run runs what a manager runs: the goroutines that call nodes. queue gets the jobs to look at.
func (r *Reconciler) Run(ctx context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	var wg sync.WaitGroup
	defer wg.Wait()
	_ = r.tracker.Source().Start(ctx, queue) // returns nil
	wg.Go(func() { _ = r.tracker.Start(ctx) })
	_ = r.workers.Start(ctx) // returns nil
}

// Deleted is what an informer does when a job is gone.
func (r *Reconciler) Deleted(job *v1beta1.ImagePullJob) { r.deleted(job) }

// JobsOfNode are the jobs that a change of a node wakes.
func (r *Reconciler) JobsOfNode(ctx context.Context) []reconcile.Request {
	return r.jobsOfNode(ctx, nil)
}

// JobsOfPod are the jobs that a change of a pod wakes.
func (r *Reconciler) JobsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	return r.jobsOfPod(ctx, pod)
}

// ForgetAll is what closing the gate does.
func (r *Reconciler) ForgetAll() { r.forgetAll() }

// Known is how many jobs the reconciler remembers.
func (r *Reconciler) Known() int { return len(r.memories) }
