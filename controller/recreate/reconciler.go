// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// conflictPause lets the cache catch up after a write that came too late.
const conflictPause = 200 * time.Millisecond

// +kubebuilder:rbac:groups=apps.kruise.io,resources=containerrecreaterequests,verbs=get;list;watch;patch;delete
// +kubebuilder:rbac:groups=apps.kruise.io,resources=containerrecreaterequests/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=pods/status,verbs=patch
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=configmaps;secrets;serviceaccounts,verbs=get
// +kubebuilder:rbac:groups="",resources=services,verbs=get;list
// +kubebuilder:rbac:groups="",resources=persistentvolumeclaims;persistentvolumes,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reconciler carries out ContainerRecreateRequests.
type Reconciler struct {
	// Client reads from the cache and writes.
	Client client.Client
	// APIReader reads past the cache. Only what the API server itself says is enough to refuse a
	// request or to take a pod for gone.
	APIReader client.Reader
	// Nodes commands the nodes.
	Nodes nodes.Operations
	// Jobs counts the restarts in Jobs' pods, together with all others who restart containers. It
	// may be nil.
	Jobs *jobbudget.Budgets
	// NodePort is the port of nodes without [nodes.AddressAnnotation]; 0 means [nodes.DefaultPort].
	NodePort int
	// Recorder writes Events.
	Recorder events.EventRecorder
	// Metrics may be nil.
	Metrics *Metrics
	// Log must be set.
	Log logrus.FieldLogger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Gate is closed while OpenKruise carries the requests out. A nil gate is always open.
	Gate *kruise.Gate

	tracker *nodes.Tracker[*opsv1.Operation]

	mu       sync.Mutex
	memories map[types.NamespacedName]*memory
}

// memory is what is worth keeping of a request between two reconciles. A new controller can find it
// out again. One worker at a time reconciles a request.
type memory struct {
	uid       types.UID
	lastWrite time.Time
	// silentSince is when the node stopped answering; attempts counts since.
	silentSince time.Time
	attempts    int
	// standIns are accounts in the place of an operation that the node has forgotten, or that it
	// refused because another operation had replaced the container.
	standIns map[string]standIn
	// firstSeen is when a new container was first seen running, by its ID.
	firstSeen map[string]time.Time
	// operations are what to forget in the end.
	operations map[nodes.Key]bool
	// cancelAsked are those the node was told to cancel after a failure.
	cancelAsked map[string]bool
	// ended are the containers that had ended by themselves. recalled says that those from before
	// this memory are among them.
	ended    map[string]bool
	recalled bool
	nudges   pods.Nudges
	// ungated says that the lack of a readiness gate has been told.
	ungated bool
}

type standIn struct {
	op       *opsv1.ContainerOperation
	replaced bool
}

func (r *Reconciler) now() time.Time {
	if r.Now != nil {
		return r.Now()
	}
	return time.Now()
}

func (r *Reconciler) remember(crr *appsv1alpha1.ContainerRecreateRequest) *memory {
	key := client.ObjectKeyFromObject(crr)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memories == nil {
		r.memories = map[types.NamespacedName]*memory{}
	}
	m := r.memories[key]
	if m == nil || m.uid != crr.UID {
		m = &memory{
			uid: crr.UID, standIns: map[string]standIn{}, firstSeen: map[string]time.Time{},
			operations: map[nodes.Key]bool{}, cancelAsked: map[string]bool{}, ended: map[string]bool{},
		}
		r.memories[key] = m
	}
	return m
}

func (r *Reconciler) forget(key types.NamespacedName) {
	r.mu.Lock()
	m := r.memories[key]
	delete(r.memories, key)
	r.mu.Unlock()
	if m != nil {
		for operation := range m.operations {
			r.tracker.Forget(operation)
			r.Jobs.Return(operation.UID)
		}
	}
}

// standDown forgets all requests: OpenKruise carries them out now.
func (r *Reconciler) standDown() {
	r.mu.Lock()
	keys := slices.Collect(maps.Keys(r.memories))
	r.mu.Unlock()
	for _, key := range keys {
		r.forget(key)
	}
	r.tracker.ForgetAll()
}

// Reconcile takes one request as far as it goes and says when to look again.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	leave, open := r.Gate.Enter()
	if !open {
		return reconcile.Result{RequeueAfter: kruise.StandBy}, nil
	}
	defer leave()
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	if err := r.Client.Get(ctx, req.NamespacedName, crr); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(req.NamespacedName)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	p := newPass(&request{
		r: r, crr: crr, memory: r.remember(crr),
		log: r.Log.WithFields(logrus.Fields{"request": req.String(), "pod": req.Namespace + "/" + crr.Spec.PodName}),
	})
	var wait time.Duration
	var err error
	switch {
	case crr.DeletionTimestamp != nil:
		wait, err = p.finalize(ctx)
	case crr.Status.CompletionTime != nil:
		wait, err = p.cleanUp(ctx)
	default:
		wait, err = p.advance(ctx)
	}
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: conflictPause}, nil
	case apierrors.IsNotFound(err):
		return reconcile.Result{}, nil // deleted meanwhile
	}
	return reconcile.Result{RequeueAfter: wait}, err
}
