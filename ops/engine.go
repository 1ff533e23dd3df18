// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/lost"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/room"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// Options configures an [Engine]. StateDir, Conn, View and Log are required.
type Options struct {
	// StateDir holds the journal and the records; it must exist.
	StateDir string
	// Conn is the connection to the runtime.
	Conn grpc.ClientConnInterface
	View *view.View
	Log  logrus.FieldLogger
	// Registerer gets the engine's metrics.
	Registerer prometheus.Registerer
	// Tracer makes spans of finished operations. Nil: none.
	Tracer trace.Tracer
	// Method is the fastest method that may be used for StopFirst. Empty means [opsv1.MethodGate].
	Method string
	// CDISpecDir is one of the directories that the runtime reads CDI specs from, for
	// [opsv1.MethodGate]. Empty: the runtime is asked.
	CDISpecDir string
	// Images is for upgrades and restarts with another image, which are refused without.
	Images imagechange.Puller
	// Pods tells kubelet's mind about pods. Without, kubelet's intentions are found by what it does
	// next.
	Pods podsapi.Pods
	// LegacyLogDir is where kubelet keeps a symlink per container log for log
	// shippers. Empty means /var/log/containers.
	LegacyLogDir string
}

// Engine runs operations and keeps their journal.
type Engine struct {
	node       *swap.Node
	disk       *store.Store
	operations *operations
	tidier     *tidier
	log        logrus.FieldLogger
	metrics    *metrics
	tracer     trace.Tracer // nil: off
}

// Open is [OpenNode] and [New].
func Open(_ context.Context, o Options) (*Engine, error) {
	node, disk, err := OpenNode(o)
	if err != nil {
		return nil, err
	}
	return New(node, disk, o)
}

// OpenNode opens the files in the state directory, and returns them with what operations share.
//
// Errors: state directory not writable, held by another process, or unreadable.
func OpenNode(o Options) (*swap.Node, *store.Store, error) {
	log := o.Log.WithField("component", "ops")
	journal, err := store.OpenJournal(o.StateDir, log)
	if err != nil {
		return nil, nil, err
	}
	records, err := store.OpenRecords(o.StateDir, log)
	if err != nil {
		return nil, nil, errors.Join(err, journal.Close())
	}
	conn := crinode.Bound(o.Conn)
	rt, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
	overrides, err := store.OpenOverrides(journal, images, log)
	if err != nil {
		return nil, nil, errors.Join(err, records.Close(), journal.Close())
	}
	node := &swap.Node{
		Client: &crinode.Client{Runtime: rt, Log: log},
		View:   o.View, Records: records, Overrides: overrides, Hooks: hooks.NewRunner(rt), Pods: o.Pods,
		Switchover: switchover.NewProber(switchover.Options{
			StateDir: o.StateDir, Runtime: rt, Log: log, Best: o.Method, CDISpecDir: o.CDISpecDir,
		}),
		Waiters: operation.NewWaiters(), Tokens: lost.NewTokens(), LateCreate: crinode.LateCreate,
		LogLinks: cmp.Or(o.LegacyLogDir, "/var/log/containers"),
	}
	node.Images = &imagechange.Node{
		Runtime: node.Client, Service: images, Puller: o.Images, Overrides: overrides, RequestOf: node.RequestOf,
	}
	node.Rooms = &room.Node{Runtime: node.Client, Switchover: node.Switchover}
	node.Lost = lost.New(lost.Options{
		Node: node.Client, View: o.View, Records: records, Switchover: node.Switchover, Tokens: node.Tokens,
		Pods: o.Pods, LogLinks: node.LogLinks, Log: log,
	})
	return node, &store.Store{Journal: journal, Records: records, Overrides: overrides, Boot: store.BootID()}, nil
}

// New reads the journal and makes the view show what unfinished operations need, without asking the
// runtime: kubelet may be served as soon as it returns. [Engine.Run] finishes those operations. The
// engine owns the files: New closes them if it returns an error.
func New(node *swap.Node, disk *store.Store, o Options) (*Engine, error) {
	all := newOperations(disk, node.Log)
	node.Active, node.Rooms.Active = all.active, all.active
	e := &Engine{
		node: node, disk: disk, operations: all, tidier: &tidier{node: node, log: node.Log}, log: node.Log,
		tracer: o.Tracer,
	}
	disk.Records.EachStarted(node.View.SetStarted)
	disk.Records.EachHeld(node.View.HoldProbesUntil)
	node.View.Guard()
	var err error
	if e.metrics, err = newMetrics(o.Registerer, e); err == nil {
		err = (&recovery{node: node, disk: disk, log: node.Log, operations: all}).recover()
	}
	if err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// Judge implements [interceptors.Judge].
func (e *Engine) Judge(ctx context.Context) error { return e.node.Lost.Judge(ctx) }

// JournalError says why operations cannot be written down, and are refused; nil if they can.
func (e *Engine) JournalError() error {
	_, err := e.disk.Journal.DB()
	return err
}

// Records returns the store for the interceptors.
func (e *Engine) Records() *store.Records { return e.node.Records }

// Overrides returns the slots with another image, for the interceptors.
func (e *Engine) Overrides() *store.Overrides { return e.node.Overrides }

// Run waits for the runtime, finishes what the journal holds and then runs
// operations until ctx ends. It returns when the last one has come to a point from
// which the journal can resume it.
func (e *Engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { guard.Keep(ctx, e.log, func() { e.begin(ctx, &wg) }) })
	for _, keep := range []func(context.Context){
		e.operations.writeAgain, e.forget, e.tidier.forgetOnRemoval, e.tidier.writeEnded,
	} {
		wg.Go(func() { guard.Keep(ctx, e.log, func() { keep(ctx) }) })
	}
	for {
		for _, o := range e.operations.next() {
			wg.Go(func() { e.execute(ctx, o) })
		}
		select {
		case <-e.operations.queue:
		case <-ctx.Done():
			return nil
		}
	}
}

// begin tidies up after earlier processes, until none of their calls to the runtime can bring a
// container about any more. wg owns what takes longer.
func (e *Engine) begin(ctx context.Context, wg *sync.WaitGroup) {
	if e.node.AwaitRuntime(ctx) == nil {
		e.node.Switchover.Probe(ctx)
		e.tidier.tidy(ctx, wg)
	}
	if crinode.Sleep(ctx, e.node.LateCreate) == nil && e.tidier.tidy(ctx, wg) {
		e.node.View.Unguard()
	}
	e.node.Tokens.Close()
}

// Close releases the state files. Run must have returned.
func (e *Engine) Close() error {
	if !e.operations.close() {
		e.log.Error("operations have ended that the journal knows as unfinished: " +
			"the next process will take them up again")
	}
	e.node.Overrides.Flush()
	e.node.Hooks.Close()
	return errors.Join(e.disk.Journal.Close(), e.node.Records.Close())
}

// forgetEvery is how often forget looks for what nobody needs any more. Operations are kept longer
// by that much at most.
const forgetEvery = 10 * time.Minute

// forget drops finished operations that are too old, and the records of containers that kubelet has
// not removed by RemoveContainer, until ctx ends.
func (e *Engine) forget(ctx context.Context) {
	for {
		if err := e.operations.expire(); err != nil {
			e.log.WithError(err).Warn("old operations stay in the journal")
		}
		if crinode.Sleep(ctx, forgetEvery) != nil {
			return
		}
		if _, err := e.tidier.forgetRemoved(ctx); err != nil {
			e.log.WithError(err).Warn("records not tidied")
		}
		e.node.Overrides.Flush()
		e.tidier.forgetOverrides(ctx)
	}
}

// CancelAll cancels all operations that may still be cancelled, and does not wait for their end. It
// may be called before [Engine.Run].
func (e *Engine) CancelAll(reason string) {
	for _, op := range e.operations.list() {
		o := e.operations.lookup(op.GetUid())
		if o == nil || op.GetFinishTime() != nil {
			continue
		}
		log := e.log.WithFields(logrus.Fields{"op": op.GetUid(), "reason": reason})
		if err := o.Cancel(reason); err != nil {
			log.WithError(err).Warn("operation not cancelled")
		} else {
			log.Info("operation cancelled")
		}
	}
}

func podName(p *opsv1.PodRef) string { return p.GetNamespace() + "/" + p.GetName() }
