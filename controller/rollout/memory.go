// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// work is what the controller remembers of a rollout between two reconciles. After a restart all of
// it can be found out again. One worker at a time reconciles a rollout.
type work struct {
	uid types.UID
	// ops is what is known of the pods and of what nodes do for them.
	ops *nodeops.State
	// fresh knows the last write of the rollout, lastWrite is when its status was last written.
	fresh     objects.Freshness
	lastWrite time.Time
	// reported are the Events that must not be repeated.
	reported map[string]bool
	// revision is the revision that ops, failures and progress are about.
	revision string
	failures map[types.UID]inplace.PodFailure
	// progress is a picture of the pods, progressed is when it last changed.
	progress   picture
	progressed time.Time
	released   chan struct{} // closed when the nodes have been told that the rollout has ended; nil before
	// memory is what is known of the workload.
	memory workload.Memory
	// refused is why the template of the workload is not changed, by the revision of the goal. api
	// counts errors of its change.
	refused map[string]*evaluate.Failure
	api     dryrun.Trouble
	// settling counts errors when the workload has to go on.
	settling dryrun.Trouble

	mu sync.Mutex
	// selector selects the pods that the rollout may be about; nil until it is known.
	selector labels.Selector
}

// refuse remembers why the template is not changed.
func (w *work) refuse(revision string, why *evaluate.Failure) {
	if w.refused == nil {
		w.refused = map[string]*evaluate.Failure{}
	}
	w.refused[revision] = why
}

// choose remembers the selector for events of pods.
func (w *work) choose(s labels.Selector) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.selector = s
}

// about returns true if the rollout may be about a pod.
func (w *work) about(r *inplace.InPlaceRollout, pod client.Object) bool {
	if r.Spec.Target.PodName != "" {
		return r.Spec.Target.PodName == pod.GetName()
	}
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.selector != nil && w.selector.Matches(labels.Set(pod.GetLabels()))
}
