// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"time"

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

// Prepare is what SetupWithManager does to r. It returns the tracker, which has to be started.
func (r *Reconciler) Prepare(client nodes.Operations, limit int) *nodes.Tracker[*opsv1.Operation] {
	r.tracker = r.newTracker(client, limit)
	return r.tracker
}

// LastHeard is the last that the node said of an operation.
func (r *Reconciler) LastHeard(operation nodes.Key) *opsv1.Operation {
	s, _ := r.tracker.Get(operation)
	return s.Op
}

// Clock is the time.
func (r *Reconciler) Clock() time.Time { return r.now() }

// Kept says how many requests, operations and streams there are.
func (r *Reconciler) Kept() (requests, operations, streams int) {
	r.mu.Lock()
	requests = len(r.memories)
	r.mu.Unlock()
	if r.tracker != nil {
		operations, streams = r.tracker.Size()
	}
	return requests, operations, streams
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
