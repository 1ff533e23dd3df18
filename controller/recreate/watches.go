// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/event"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// maxWatches bounds the streams to nodes. The reconciler polls the operations beyond it.
const maxWatches = 1024

// requestEvent wakes the reconciler for one request.
type requestEvent = event.TypedGenericEvent[*appsv1alpha1.ContainerRecreateRequest]

// operationWatches keeps one stream per running operation, remembers the last message of each, and
// wakes the reconciler at each message. Start owns the streams. A stream ends with its operation,
// with its node, on forget, or with Start.
type operationWatches struct {
	client  nodes.Operations
	metrics *Metrics
	log     logrus.FieldLogger
	limit   int
	// events is read by the reconciler's source.
	events chan requestEvent
	// wanted hands new watches to Start.
	wanted chan *operationWatch

	mu     sync.Mutex
	ops    map[string]*operationWatch
	active int // streams running or about to
}

// operationWatch is one operation. The mutex of operationWatches guards all its fields but uid and
// request.
type operationWatch struct {
	node    nodes.Node
	uid     string
	request types.NamespacedName

	latest  *opsv1.Operation
	heard   time.Time
	running bool
	cancel  context.CancelFunc // nil until Start has picked it up
	dropped bool
}

func newOperationWatches(client nodes.Operations, m *Metrics, log logrus.FieldLogger, limit int) *operationWatches {
	return &operationWatches{
		client: client, metrics: m, log: log, limit: limit,
		events: make(chan requestEvent),
		wanted: make(chan *operationWatch, limit),
		ops:    map[string]*operationWatch{},
	}
}

// Start runs the streams until ctx is done and all have ended. It returns nil.
func (w *operationWatches) Start(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case op := <-w.wanted:
			wg.Go(func() { w.run(ctx, op) })
		}
	}
}

func (w *operationWatches) run(ctx context.Context, op *operationWatch) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.mu.Lock()
	op.cancel = cancel
	if op.dropped {
		cancel()
	}
	node := op.node
	w.mu.Unlock()
	w.metrics.watching(1)
	defer w.metrics.watching(-1)

	err := w.client.WatchOperation(ctx, node, op.uid, func(latest *opsv1.Operation) {
		w.mu.Lock()
		op.latest, op.heard = latest, time.Now()
		w.mu.Unlock()
		w.wake(ctx, op.request)
	})
	w.mu.Lock()
	op.running, op.cancel = false, nil
	w.active--
	w.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		w.log.WithError(err).WithFields(logrus.Fields{"node": node.Name, "op": op.uid}).Debug("operation watch ended early")
		w.wake(ctx, op.request)
	}
}

func (w *operationWatches) wake(ctx context.Context, request types.NamespacedName) {
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	crr.Namespace, crr.Name = request.Namespace, request.Name
	select {
	case w.events <- requestEvent{Object: crr}:
	case <-ctx.Done():
	}
}

// set records what a unary call said of an operation, and watches the operation from then on unless
// it has finished or the limit is reached.
func (w *operationWatches) set(node nodes.Node, request types.NamespacedName, latest *opsv1.Operation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	op := w.ops[latest.GetUid()]
	if op == nil {
		op = &operationWatch{uid: latest.GetUid(), request: request}
		w.ops[op.uid] = op
	}
	if op.latest.GetFinishTime() == nil { // a finished operation stays as it is
		op.latest, op.heard = latest, time.Now()
	}
	op.node = node
	if op.running || op.latest.GetFinishTime() != nil || w.active >= w.limit {
		return
	}
	select {
	case w.wanted <- op:
		op.running = true
		w.active++
	default:
	}
}

// get returns the last that the node said of an operation, when that was, and whether a stream will
// tell more. op is nil when nothing is known.
func (w *operationWatches) get(uid string) (op *opsv1.Operation, heard time.Time, watched bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if o := w.ops[uid]; o != nil {
		return o.latest, o.heard, o.running
	}
	return nil, time.Time{}, false
}

// forget drops an operation and ends its stream.
func (w *operationWatches) forget(uid string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if op := w.ops[uid]; op != nil {
		op.dropped = true
		if op.cancel != nil {
			op.cancel()
		}
		delete(w.ops, uid)
	}
}
