// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// memory is what the reconciler keeps of a job from one reconcile to the next. A controller that
// starts finds it out again. One worker at a time reconciles a job.
type memory struct {
	uid   types.UID
	state *jobState // nil when the job is not at work
	inbox inbox
	// cleanups are the nodes that are being told to forget the job, by name.
	cleanups map[string]*cleanup
	// matched says that no node or pod has changed since the spec of state was matched with the
	// nodes.
	matched atomic.Bool
	written objects.Freshness
	// cleanedUp is closed when the nodes have been told that the job is deleted; nil until the
	// controller begins to tell them.
	cleanedUp chan struct{}
	// invalid is the mistake in the spec that an Event has reported.
	invalid string
}

// gather is how long to collect news of a job.
func (r *Reconciler) gather(req reconcile.Request) time.Duration {
	r.mu.Lock()
	m := r.memories[req.NamespacedName]
	r.mu.Unlock()
	if m == nil {
		return 0
	}
	return m.inbox.gather()
}

// rematch has the next reconcile of a job find out which nodes the job chooses.
func (r *Reconciler) rematch(key types.NamespacedName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.memories[key]; m != nil {
		m.matched.Store(false)
	}
}

func (r *Reconciler) memoryOf(job *v1beta1.ImagePullJob) *memory {
	key := client.ObjectKeyFromObject(job)
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.memories[key]
	if m == nil || m.uid != job.UID {
		m.close()
		m = &memory{uid: job.UID}
		r.memories[key] = m
	}
	return m
}

func (m *memory) close() {
	if m != nil && m.state != nil {
		m.state.close()
	}
}

func (r *Reconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	m := r.memories[key]
	delete(r.memories, key)
	r.mu.Unlock()
	m.close()
}

// forgetAll forgets all jobs and ends the calls to nodes: the jobs are somebody else's.
func (r *Reconciler) forgetAll() {
	r.mu.Lock()
	keys := slices.Collect(maps.Keys(r.memories))
	r.mu.Unlock()
	for _, key := range keys {
		r.forget(key)
	}
}
