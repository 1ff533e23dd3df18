// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

const (
	// maxActive bounds unfinished operations: more than a node has containers (kubelet's
	// default is 110 pods) would only be a caller gone wild.
	maxActive = 1024
	// finished operations are answered for an hour, so that a controller that was away that
	// long still learns the outcome, and at most maxFinished of them.
	keepFinished = time.Hour
	maxFinished  = 2000
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
	node    *swap.Node
	log     logrus.FieldLogger
	disk    *store.Store
	metrics *metrics
	tracer  trace.Tracer // nil: off

	// queue wakes Run for operations that are accepted and not yet started.
	queue chan struct{}
	// late wakes Run for ends that could not be written.
	late chan struct{}
	// lateCreate is [crinode.LateCreate], but for tests that count calls.
	lateCreate time.Duration

	mu      sync.Mutex // guards all following fields
	ops     map[string]*operation.Operation
	waiting []*operation.Operation
	closed  bool
	// unwritten are finished operations whose end the journal does not have. The next process would
	// resume them, and restart a container that was reported as left alone.
	unwritten []*operation.Operation
}

// Open reads the journal in the state directory and makes the view show what
// unfinished operations need, without asking the runtime: kubelet may be served as soon as it
// returns. [Engine.Run] finishes those operations.
//
// Errors: state directory not writable, held by another process, or unreadable.
func Open(_ context.Context, o Options) (*Engine, error) {
	log := o.Log.WithField("component", "ops")
	journal, err := store.OpenJournal(o.StateDir, log)
	if err != nil {
		return nil, err
	}
	records, err := store.OpenRecords(o.StateDir, log)
	if err != nil {
		return nil, errors.Join(err, journal.Close())
	}
	rt := runtimeapi.NewRuntimeServiceClient(crinode.Bound(o.Conn))
	node := &swap.Node{
		Client: &crinode.Client{Runtime: rt, Log: log},
		View:   o.View, Records: records, Hooks: hooks.NewRunner(rt), Pods: o.Pods,
		Switchover: switchover.NewProber(switchover.Options{
			StateDir: o.StateDir, Runtime: rt, Log: log, Best: o.Method, CDISpecDir: o.CDISpecDir,
		}),
		Waiters: operation.NewWaiters(), Tokens: lost.NewTokens(),
		LogLinks: cmp.Or(o.LegacyLogDir, "/var/log/containers"),
	}
	e := &Engine{
		node:       node,
		log:        log,
		disk:       &store.Store{Journal: journal, Records: records, Boot: store.BootID()},
		tracer:     o.Tracer,
		queue:      make(chan struct{}, 1),
		late:       make(chan struct{}, 1),
		lateCreate: crinode.LateCreate,
		ops:        map[string]*operation.Operation{},
	}
	node.Active = e.activeOperations
	node.Images = &imagechange.Node{
		Runtime: node.Client, Service: runtimeapi.NewImageServiceClient(crinode.Bound(o.Conn)), Puller: o.Images,
		RequestOf: node.RequestOf,
	}
	node.Rooms = &room.Node{Runtime: node.Client, Switchover: node.Switchover, Active: node.Active}
	node.Lost = lost.New(lost.Options{
		Node: node.Client, View: o.View, Records: records, Switchover: node.Switchover, Tokens: node.Tokens,
		Pods:     o.Pods,
		LogLinks: node.LogLinks, Log: log,
	})
	records.EachStarted(o.View.SetStarted)
	records.EachHeld(o.View.HoldProbesUntil)
	o.View.Guard()
	if node.Overrides, err = store.OpenOverrides(journal, node.Images.Service, log); err == nil {
		e.disk.Overrides, node.Images.Overrides = node.Overrides, node.Overrides
		e.metrics, err = newMetrics(o.Registerer, e)
	}
	if err == nil {
		err = journal.Load(e.revive, e.leaveAlone, func(err error) {
			log.WithError(err).Error("journal record set aside; what its operation has staged is removed")
		})
	}
	if err == nil {
		e.forgetEndedEnvironments()
	}
	// Operations that wait for the same slot get it in the order they came.
	slices.SortStableFunc(e.waiting, func(a, b *operation.Operation) int {
		return a.CreateTime().Compare(b.CreateTime())
	})
	if err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// revive takes one operation from the journal, and makes the view show what its containers need.
func (e *Engine) revive(uid string, r *store.Record) error {
	o, err := operation.Decode(uid, r, e.disk)
	if err != nil {
		return err
	}
	finished, status := o.Finished(), o.Snapshot()
	var claims []*view.Claim
	for i, rec := range o.Records() {
		if finished || !rec.HoldsSlot() {
			e.node.Lost.Settled(rec.Token, status.GetContainers()[i].GetPhase() == opsv1.Phase_PHASE_SUCCEEDED)
			continue
		}
		claim, err := e.reclaim(o, o.Container(i), &rec)
		if err != nil {
			for _, c := range claims {
				c.Release()
			}
			return err
		}
		claims = append(claims, claim)
	}
	e.ops[uid] = o
	if finished {
		return nil
	}
	e.waiting = append(e.waiting, o)
	e.log.WithFields(logrus.Fields{"op": uid, "pod": o.PodName(), "phase": status.GetPhase()}).
		Info("resuming operation from the journal")
	return nil
}

// reclaim takes the slot of a container whose operation the process before this one had begun, and
// makes the view show what the container's step needs.
func (e *Engine) reclaim(
	o *operation.Operation, c *operation.Container, rec *store.Container,
) (*view.Claim, error) {
	isUpgrade := o.Upgrade() != nil
	e.node.Lost.Replaced(rec.Incumbent)
	claim, err := e.node.View.TryClaim(c.Slot())
	if err != nil {
		return nil, fmt.Errorf("slot %s: %w", c.Slot(), err)
	}
	claim.Bind(rec.Sandbox, rec.Incumbent)
	c.SetClaim(claim)
	if rec.Driven(isUpgrade) {
		claim.WillDrive()
	}
	if !rec.Hidden() {
		e.node.Lost.Settled(rec.Token, true)
		return claim, nil // what kubelet has seen must not vanish again
	}
	e.node.Tokens.Add(rec.Token)
	claim.HideNow(rec.Token)
	claim.Staged(rec.Successor)
	if !o.Rebooted() && rec.Masked(isUpgrade) {
		claim.Mask()
	}
	return claim, nil
}

// leaveAlone takes an operation from the journal that this binary does not understand. The
// operation is reported as failed. Nothing of it is undone, removed or changed in the file.
func (e *Engine) leaveAlone(uid string, raw []byte, r *store.Record, why string) {
	e.node.Lost.LeaveAlone(raw)
	message := why + ": it is left alone, with its containers, until that version is installed again"
	o, wasRunning := operation.LeftAlone(uid, r, message, e.disk)
	if wasRunning {
		e.log.WithFields(logrus.Fields{"op": uid, "pod": o.PodName()}).
			Error("an operation of the journal is left alone: " + message)
	}
	e.ops[uid] = o
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
	for _, keep := range []func(context.Context){e.writeAgain, e.forget, e.forgetOnRemoval, e.writeEnded} {
		wg.Go(func() { guard.Keep(ctx, e.log, func() { keep(ctx) }) })
	}
	for {
		e.mu.Lock()
		waiting := e.waiting
		e.waiting = nil
		e.mu.Unlock()
		for _, o := range waiting {
			wg.Go(func() { e.execute(ctx, o) })
		}
		select {
		case <-e.queue:
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
		e.tidy(ctx, wg)
	}
	if crinode.Sleep(ctx, e.lateCreate) == nil && e.tidy(ctx, wg) {
		e.node.View.Unguard()
	}
	e.node.Tokens.Close()
}

// Close releases the state files. Run must have returned.
func (e *Engine) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	if !e.writeEnds() {
		e.log.Error("operations have ended that the journal knows as unfinished: " +
			"the next process will take them up again")
	}
	e.node.Overrides.Flush()
	e.node.Hooks.Close()
	return errors.Join(e.disk.Journal.Close(), e.node.Records.Close())
}

// writeLater queues the end of the operation to be written as soon as the journal can be written.
func (e *Engine) writeLater(o *operation.Operation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unwritten = append(e.unwritten, o)
	select {
	case e.late <- struct{}{}:
	default:
	}
}

// writePause is how long writeAgain waits between its tries: a disk that is full stays so for a
// while.
const writePause = time.Second

// writeAgain writes ends that could not be written, until ctx ends.
func (e *Engine) writeAgain(ctx context.Context) {
	for {
		select {
		case <-e.late:
		case <-ctx.Done():
			return
		}
		for crinode.Sleep(ctx, writePause) == nil && !e.writeEnds() {
			continue
		}
	}
}

// writeEnds tries to write the ends that are not written, and reports whether it has written all.
func (e *Engine) writeEnds() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unwritten = slices.DeleteFunc(e.unwritten, func(o *operation.Operation) bool {
		return e.ops[o.UID()] != o || o.Save() == nil
	})
	return len(e.unwritten) == 0
}

// forgetEvery is how often forget looks for what nobody needs any more. Operations are kept longer
// by that much at most.
const forgetEvery = 10 * time.Minute

// forget drops finished operations that are too old, and the records of containers that kubelet has
// not removed by RemoveContainer, until ctx ends.
func (e *Engine) forget(ctx context.Context) {
	for {
		e.mu.Lock()
		err := e.expireLocked(time.Now())
		e.mu.Unlock()
		if err != nil {
			e.log.WithError(err).Warn("old operations stay in the journal")
		}
		if crinode.Sleep(ctx, forgetEvery) != nil {
			return
		}
		if _, err := e.forgetRemoved(ctx); err != nil {
			e.log.WithError(err).Warn("records not tidied")
		}
		e.node.Overrides.Flush()
		e.forgetOverrides(ctx)
	}
}

// tidy forgets containers that went away while the proxy did not look, and takes care of those
// whose operation is lost; wg owns that. It tries until the runtime lists its containers, and
// returns false if ctx ends before.
func (e *Engine) tidy(ctx context.Context, wg *sync.WaitGroup) bool {
	defer e.node.Lost.Clear(ctx, wg) // even after a panic: their slots are held
	e.forgetOverrides(ctx)
	if e.node.Lost.AwaitJudged(ctx) != nil {
		return false
	}
	list, err := e.forgetRemoved(ctx)
	for wait := 200 * time.Millisecond; err != nil; wait = min(2*wait, 5*time.Second) {
		e.log.WithError(err).Warn("records not tidied; trying again")
		e.node.Lost.Clear(ctx, wg) // does not wait for that
		if crinode.Sleep(ctx, wait) != nil {
			return false
		}
		list, err = e.forgetRemoved(ctx)
	}
	e.node.Lost.JudgeNew(ctx, list) // what has come about since
	if err := e.node.Switchover.RemoveStray(e.node.Tokens.Has); err != nil {
		e.log.WithError(err).Warn("gates that no operation knows not removed")
	}
	return true
}

// forgetRemoved forgets containers that do not exist any more, and returns those that do.
func (e *Engine) forgetRemoved(ctx context.Context) ([]*runtimeapi.Container, error) {
	// What is recorded is read first: a container made between the two reads is in the list but not
	// in the records read, and stays.
	recorded := map[string]bool{}
	for _, id := range e.node.Records.IDs() {
		recorded[id] = true
	}
	list, err := e.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, c := range list.GetContainers() {
		delete(recorded, c.GetId())
	}
	for id := range recorded {
		e.node.Records.Removed(id)
		e.node.View.Forget(id)
	}
	return list.GetContainers(), nil
}

// accept begins an operation: once it returns nil, the operation is in the journal. A command whose
// UID is known is taken as repeated.
func (e *Engine) accept(c operation.Command, pod *opsv1.PodRef) (*operation.Operation, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, status.Error(codes.Unavailable, "cri-proxy is shutting down; try again")
	}
	uid := c.Restart.GetUid()
	if known := e.ops[uid]; known != nil {
		return known, known.Repeat(c)
	}
	active := e.activeLocked()
	if active >= maxActive {
		return nil, status.Errorf(codes.ResourceExhausted, "%d operations are unfinished on this node, "+
			"which is the most it takes; wait for some to finish (cri-proxy ctl ops --active)", active)
	}
	if err := e.expireLocked(time.Now()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	o := operation.New(c, pod, e.disk)
	if err := o.Accept(); err != nil {
		return nil, status.Errorf(codes.Internal, "the operation was not accepted and nothing was done: %v", err)
	}
	e.ops[uid] = o
	e.waiting = append(e.waiting, o)
	select {
	case e.queue <- struct{}{}:
	default:
	}
	return o, nil
}

func (e *Engine) activeLocked() int {
	n := 0
	for _, o := range e.ops {
		if !o.Finished() {
			n++
		}
	}
	return n
}

// activeOperations returns the operations that have not finished.
func (e *Engine) activeOperations() []*operation.Operation {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*operation.Operation
	for _, o := range e.ops {
		if !o.Finished() {
			all = append(all, o)
		}
	}
	return all
}

// lookup returns the operation, or nil.
func (e *Engine) lookup(uid string) *operation.Operation {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ops[uid]
}

// list returns all operations, newest first.
func (e *Engine) list() []*opsv1.Operation {
	e.mu.Lock()
	ops := make([]*operation.Operation, 0, len(e.ops))
	for _, o := range e.ops {
		ops = append(ops, o)
	}
	e.mu.Unlock()
	out := make([]*opsv1.Operation, 0, len(ops))
	for _, o := range ops {
		out = append(out, o.Snapshot())
	}
	slices.SortFunc(out, func(a, b *opsv1.Operation) int {
		return b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime())
	})
	return out
}

// expireLocked forgets finished operations that are too old or too many. The caller holds e.mu.
func (e *Engine) expireLocked(now time.Time) error {
	type done struct {
		uid string
		at  time.Time
	}
	var finished []done
	for uid, o := range e.ops {
		if at, ok := o.FinishedAt(); ok && !o.IsLeftAlone() {
			finished = append(finished, done{uid, at})
		}
	}
	slices.SortFunc(finished, func(a, b done) int { return a.at.Compare(b.at) })
	var gone []string
	for i, d := range finished {
		if now.Sub(d.at) > keepFinished || len(finished)-i > maxFinished {
			gone = append(gone, d.uid)
		}
	}
	if err := e.disk.Journal.Remove(gone); err != nil {
		return err
	}
	for _, uid := range gone {
		delete(e.ops, uid)
	}
	return nil
}

// CancelAll cancels all operations that may still be cancelled, and does not wait for their end. It
// may be called before [Engine.Run].
func (e *Engine) CancelAll(reason string) {
	for _, op := range e.list() {
		o := e.lookup(op.GetUid())
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
