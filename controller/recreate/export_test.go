// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// The tests reconcile without a manager: they wait for the same wakes, and run the streams
// themselves. And they see to it that nothing is kept for ever, which nobody else can see.

// Names of the package.
const PodNameIndex = podNameIndex

// What SetupWithManager gives to a manager.
var (
	IndexPodName = indexPodName
	PodChanges   = podChanges
)

// TellReady sets the conditions for kstatus.
var TellReady = tellReady

// Prepare is what SetupWithManager does to r. It returns what runs the streams.
func (r *Reconciler) Prepare(client nodes.Operations, log logrus.FieldLogger, limit int) func(context.Context) error {
	r.watches = newOperationWatches(client, nil, log, limit)
	return r.watches.Start
}

// LimitStreams bounds the streams.
func (r *Reconciler) LimitStreams(n int) { r.watches.limit = n }

// Wakes has an element for each request to reconcile.
func (r *Reconciler) Wakes() <-chan requestEvent { return r.watches.events }

// LastHeard is the last that the node said of an operation.
func (r *Reconciler) LastHeard(uid string) *opsv1.Operation {
	op, _, _ := r.watches.get(uid)
	return op
}

// Clock is the time.
func (r *Reconciler) Clock() time.Time { return r.now() }

// Kept says how many requests, operations and streams there are.
func (r *Reconciler) Kept() (requests, operations, streams int) {
	r.mu.Lock()
	requests = len(r.memories)
	r.mu.Unlock()
	if r.watches == nil {
		return requests, 0, 0
	}
	r.watches.mu.Lock()
	defer r.watches.mu.Unlock()
	return requests, len(r.watches.ops), r.watches.active
}

// SilentSince is when the node of a request stopped to answer.
func (r *Reconciler) SilentSince(crr *appsv1alpha1.ContainerRecreateRequest) time.Time {
	return r.remember(crr).silentSince
}

// Remember keeps what is known of a request.
func (r *Reconciler) Remember(crr *appsv1alpha1.ContainerRecreateRequest) { r.remember(crr) }

// StandDown is what happens when OpenKruise comes.
func (r *Reconciler) StandDown() { r.standDown() }

// RequestsOfPod are the requests to reconcile when a pod changes.
var RequestsOfPod = (*Reconciler).requestsOfPod
