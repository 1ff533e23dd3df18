// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
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

	kindRestart = "Restart"
	kindUpgrade = "Upgrade"
)

// Images puts images on the node for upgrades and overrides. [*prepull.Puller] does.
type Images interface {
	// Ensure pulls an image unless it is there, and reports changes to each. It returns the finished pull, or ctx's error.
	Ensure(ctx context.Context, req *opsv1.PullRequest, each func(*opsv1.PullOperation)) (*opsv1.PullOperation, error)
	// Pin keeps an image that is on the node from kubelet's image garbage collection.
	Pin(ctx context.Context, image, owner string, until time.Time) error
}

// Options configures an [Engine]. StateDir, Conn, View and Log are required.
type Options struct {
	// StateDir holds the journal and the records; it must exist.
	StateDir string
	// Conn is the connection to the runtime.
	Conn grpc.ClientConnInterface
	View *interceptors.View
	Log  logrus.FieldLogger
	// Registerer gets the engine's metrics.
	Registerer prometheus.Registerer
	// Tracer makes spans of finished operations. Nil: none.
	Tracer trace.Tracer
	// Method is the fastest method that may be used for StopFirst. Empty means [opsv1.MethodGate].
	Method Method
	// CDISpecDir is one of the directories that the runtime reads CDI specs from, for
	// [opsv1.MethodGate]. Empty: the runtime is asked.
	CDISpecDir string
	// Images is for upgrades and restarts with another image, which are refused without.
	Images Images
	// Pods tells kubelet's mind about pods. Without, kubelet's intentions are found by what it does next.
	Pods Pods
	// LegacyLogDir is where kubelet keeps a symlink per container log for log
	// shippers. Empty means /var/log/containers.
	LegacyLogDir string
}

// Engine runs operations and keeps their journal.
type Engine struct {
	view       *interceptors.View
	boot       string // of the machine
	log        logrus.FieldLogger
	rt         runtimeapi.RuntimeServiceClient
	img        runtimeapi.ImageServiceClient
	journal    *journal
	records    *Records
	node       *crinode.Client
	hooks      *hooks.Runner
	legacyLog  string
	metrics    *metrics
	tracer     trace.Tracer // nil: off
	switchover *switchover.Prober
	overrides  *Overrides
	images     Images // nil: no upgrades and overrides
	pods       Pods   // may be nil

	// queue wakes Run for operations that are accepted and not yet started.
	queue chan struct{}
	// late wakes Run for ends that could not be written.
	late chan struct{}
	// limits is held while the limits of pods are changed, see [cgroup.Raise].
	limits sync.Mutex

	// lateCreate is the constant of that name, but for tests that count calls.
	lateCreate time.Duration
	// judging is held while containers are judged; judged is set once all have been. See Judge.
	judging chan struct{}
	judged  atomic.Bool

	mu      sync.Mutex // guards all following fields
	ops     map[string]*operation
	waiting []*operation
	closed  bool
	// tokens are all that this process has used or found in the journal, until nothing more can
	// be a stray; see removeStrays.
	tokens map[string]bool
	// settled are the tokens of containers that the journal knows as having taken over, incumbents the containers that its operations replace.
	settled    map[string]bool
	incumbents map[string]bool
	// decided are the tokens that judge has met.
	decided map[string]bool
	// left are the records that this binary does not understand, leftSlots the slots with containers of theirs that are hidden, by the operation.
	left      [][]byte
	leftSlots map[interceptors.Slot]string
	// lost are the slots with containers of operations that no journal knows, until Run takes care of them.
	lost []*lostSlot
	// unwritten are finished operations whose end the journal does not have: the next process would take them up again, and
	// restart a container of which it was said that it is left alone.
	unwritten []*operation
	turns     turns
}

// operation is one operation in memory.
type operation struct {
	req     *opsv1.RestartRequest
	upgrade *opsv1.PrepareUpgradeRequest // nil if it is none; without credentials
	// left is set of one that this binary does not understand: the journal keeps it as it is.
	left bool
	// rebooted is set of one that another boot of the machine has cut off.
	rebooted bool

	mu         sync.Mutex // guards all following fields
	op         *opsv1.Operation
	containers []containerRecord
	changed    chan struct{} // closed and replaced at each change
	cancelled  chan struct{} // closed by cancel
	cancelSaid bool          // cancelled is closed
	committed  bool          // something has been stopped, or is about to be
	released   chan struct{} // closed when an upgrade is committed by its caller
	isReleased bool          // released is closed
	// credentials are for the pulls; supplied is closed and replaced when there are others.
	credentials []*opsv1.RegistryCredential
	supplied    chan struct{}
	// forgotten is whether there were credentials in the process before this one, until there are others.
	forgotten bool
	// environments are by container; had, of which there were any, also in the process before this one.
	environments environments
	had          []string
	// certain are the containers of an upgrade that will be, as its caller has said with the commit, what kubelet asks for.
	certain map[string]bool
	claims  map[int]*interceptors.Claim
	stays   []stay // for metrics and traces
}

// Open reads the journal in the state directory and makes the view show what
// unfinished operations need, without asking the runtime: kubelet may be served as soon as it
// returns. [Engine.Run] finishes those operations.
//
// Errors: state directory not writable, held by another process, or unreadable.
func Open(_ context.Context, o Options) (*Engine, error) {
	log := o.Log.WithField("component", "ops")
	j, err := openJournal(o.StateDir, log)
	if err != nil {
		return nil, err
	}
	records, err := openRecords(o.StateDir, log)
	if err != nil {
		return nil, errors.Join(err, j.Close())
	}
	rt := runtimeapi.NewRuntimeServiceClient(crinode.Bound(o.Conn))
	e := &Engine{
		view:      o.View,
		boot:      bootID(),
		log:       log,
		rt:        rt,
		img:       runtimeapi.NewImageServiceClient(crinode.Bound(o.Conn)),
		journal:   j,
		records:   records,
		node:      &crinode.Client{Runtime: rt, Log: log},
		hooks:     hooks.NewRunner(rt),
		legacyLog: o.LegacyLogDir,
		switchover: switchover.NewProber(switchover.Options{
			StateDir: o.StateDir, Runtime: rt, Log: log, Best: o.Method, CDISpecDir: o.CDISpecDir,
		}),
		images:     o.Images,
		tracer:     o.Tracer,
		pods:       o.Pods,
		queue:      make(chan struct{}, 1),
		late:       make(chan struct{}, 1),
		lateCreate: lateCreate,
		ops:        map[string]*operation{},
		tokens:     map[string]bool{},
		turns:      turns{held: map[interceptors.Slot]*operation{}, wanted: map[interceptors.Slot]*wanted{}},
		settled:    map[string]bool{},
		incumbents: map[string]bool{},
		decided:    map[string]bool{},
		leftSlots:  map[interceptors.Slot]string{},
		judging:    make(chan struct{}, 1),
	}
	if e.legacyLog == "" {
		e.legacyLog = "/var/log/containers"
	}
	records.eachStarted(o.View.SetStarted)
	records.eachHeld(o.View.HoldProbesUntil)
	o.View.Guard()
	if e.overrides, err = openOverrides(j, e.img, log); err == nil {
		e.metrics, err = newMetrics(o.Registerer, e)
	}
	if err == nil {
		err = j.load(e.revive, e.leaveAlone, func(err error) {
			log.WithError(err).Error("journal record set aside; what its operation has staged is removed")
		})
	}
	if err == nil {
		e.forgetEndedEnvironments()
	}
	// Those that wait for the same slot get it in the order they came.
	slices.SortStableFunc(e.waiting, func(a, b *operation) int {
		return a.op.GetCreateTime().AsTime().Compare(b.op.GetCreateTime().AsTime())
	})
	if err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// revive takes one operation from the journal.
func (e *Engine) revive(uid string, r *record) error {
	o := newOperation(&opsv1.RestartRequest{}, &opsv1.Operation{}, r.Containers)
	if err := errors.Join(proto.Unmarshal(r.Operation, o.op), proto.Unmarshal(r.Request, o.req)); err != nil {
		return fmt.Errorf("decoding: %w", err)
	}
	if r.Upgrade != nil {
		o.upgrade = &opsv1.PrepareUpgradeRequest{}
		if err := proto.Unmarshal(r.Upgrade, o.upgrade); err != nil {
			return fmt.Errorf("decoding: %w", err)
		}
		if len(o.upgrade.GetContainers()) != len(o.containers) {
			return errors.New("the record does not hold together: was the file edited?")
		}
	}
	o.forgotten, o.had = r.Credentials, r.Environments
	o.rebooted = r.Boot != "" && e.boot != "" && r.Boot != e.boot
	if r.Committed {
		o.isReleased = true
		close(o.released)
	}
	if n := len(o.containers); n != len(o.op.GetContainers()) || n != len(o.req.GetContainers()) || uid != o.op.GetUid() {
		return errors.New("the record does not hold together: was the file edited?")
	}
	if o.op.GetFinishTime() != nil {
		for i, c := range o.containers {
			e.settled[c.Token] = o.op.GetContainers()[i].GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
		}
		e.ops[uid] = o
		return nil
	}
	if r.Cancelled {
		o.cancelSaid = true
		close(o.cancelled)
	}
	for i := range o.containers {
		c := &o.containers[i]
		if c.Step == stepNone || c.Step == stepDone {
			e.settled[c.Token] = o.op.GetContainers()[i].GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
			continue
		}
		e.incumbents[c.Incumbent] = true
		o.committed = o.committed || !c.StopBy.IsZero() || c.Step == stepStop || c.Step == stepAsk || c.Step == stepStarted || c.Step == stepReveal
		slot := interceptors.Slot{PodUID: o.op.GetPod().GetUid(), Container: o.op.GetContainers()[i].GetName()}
		claim, err := e.view.TryClaim(slot)
		if err != nil {
			for _, c := range o.claims {
				c.Release()
			}
			return fmt.Errorf("slot %s: %w", slot, err)
		}
		claim.Bind(c.Sandbox, c.Incumbent)
		o.claims[i] = claim
		if o.upgrade != nil && c.Step != stepStage && c.Step != stepUndo || o.upgrade == nil && c.joinable() {
			claim.WillDrive()
		}
		if c.Step == stepReveal {
			e.settled[c.Token] = true
			continue // what kubelet has seen must not vanish again
		}
		e.tokens[c.Token] = true
		claim.HideNow(c.Token)
		claim.Staged(c.Successor)
		if !o.rebooted && c.Step != stepStage && (o.upgrade == nil || c.Step == stepStop || c.Step == stepAsk || c.Step == stepStarted) {
			claim.Mask()
		}
	}
	e.ops[uid] = o
	e.waiting = append(e.waiting, o)
	e.log.WithFields(logrus.Fields{"op": uid, "pod": podName(o.op.GetPod()), "phase": o.op.GetPhase()}).Info("resuming operation from the journal")
	return nil
}

// leaveAlone takes an operation from the journal that this binary does not understand. It is told of as one that has failed; nothing of it is undone,
// removed or changed in the file.
func (e *Engine) leaveAlone(uid string, raw []byte, r *record, why string) {
	e.left = append(e.left, raw)
	message := why + ": it is left alone, with its containers, until that version is installed again"
	o := newOperation(&opsv1.RestartRequest{}, &opsv1.Operation{}, nil)
	o.left = true
	if r == nil || proto.Unmarshal(r.Operation, o.op) != nil || proto.Unmarshal(r.Request, o.req) != nil || o.op.GetUid() != uid {
		o.op, o.req = &opsv1.Operation{Uid: uid}, &opsv1.RestartRequest{Uid: uid}
	} else if r.Upgrade != nil {
		o.upgrade = &opsv1.PrepareUpgradeRequest{}
		if proto.Unmarshal(r.Upgrade, o.upgrade) != nil {
			o.upgrade = nil
		}
	}
	if o.op.GetFinishTime() == nil {
		o.op.Phase, o.op.FinishTime, o.op.Message = opsv1.Phase_PHASE_FAILED, timestamppb.Now(), message
		for _, c := range o.op.GetContainers() {
			if slices.Contains(course, c.GetPhase()) {
				c.Phase, c.Reason, c.Message = opsv1.Phase_PHASE_FAILED, ReasonVersion, message
			}
		}
		e.log.WithFields(logrus.Fields{"op": uid, "pod": podName(o.op.GetPod())}).Error("an operation of the journal is left alone: " + message)
	}
	e.ops[uid] = o
}

// isLeftAlone reports whether the token is that of an operation that this binary does not understand, wherever its record has it.
func (e *Engine) isLeftAlone(token string) bool {
	return slices.ContainsFunc(e.left, func(raw []byte) bool { return bytes.Contains(raw, []byte(token)) }) // never changes after Open
}

// refuseLeft is an outcome if the slot has something hidden of an operation that this binary does not understand.
func (e *Engine) refuseLeft(slot interceptors.Slot) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if uid := e.leftSlots[slot]; uid != "" {
		return failf(ReasonVersion, "container %q has a successor of another version of cri-proxy waiting: install that version again, or delete the pod (the journal's operations: cri-proxy ctl ops)", slot.Container)
	}
	return nil
}

// JournalError says why operations cannot be written down, and are refused; nil if they can.
func (e *Engine) JournalError() error {
	_, err := e.journal.DB()
	return err
}

// Records returns the store for the interceptors.
func (e *Engine) Records() *Records { return e.records }

// Overrides returns the slots with another image, for the interceptors.
func (e *Engine) Overrides() *Overrides { return e.overrides }

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

// begin does what is to be done once: it tidies up after earlier processes, until nothing of theirs can come about any more. wg owns what takes longer.
func (e *Engine) begin(ctx context.Context, wg *sync.WaitGroup) {
	if e.node.AwaitRuntime(ctx) == nil {
		e.switchover.Probe(ctx)
		e.tidy(ctx, wg)
	}
	if sleep(ctx, e.lateCreate) == nil && e.tidy(ctx, wg) {
		e.view.Unguard()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tokens = nil
}

// Close releases the state files. Run must have returned.
func (e *Engine) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	if !e.writeEnds() {
		e.log.Error("operations have ended that the journal knows as unfinished: the next process will take them up again")
	}
	e.overrides.flush()
	e.hooks.Close()
	return errors.Join(e.journal.Close(), e.records.close())
}

// writeLater has the end of the operation written as soon as that is possible.
func (e *Engine) writeLater(o *operation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unwritten = append(e.unwritten, o)
	select {
	case e.late <- struct{}{}:
	default:
	}
}

// writePause is how long writeAgain waits between its tries: a disk that is full stays so for a while.
const writePause = time.Second

// writeAgain writes ends that could not be written, until ctx ends.
func (e *Engine) writeAgain(ctx context.Context) {
	for {
		select {
		case <-e.late:
		case <-ctx.Done():
			return
		}
		for sleep(ctx, writePause) == nil && !e.writeEnds() {
			continue
		}
	}
}

// writeEnds tries to write what is unwritten and reports whether nothing is left.
func (e *Engine) writeEnds() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unwritten = slices.DeleteFunc(e.unwritten, func(o *operation) bool {
		uid := o.op.GetUid() // never changes
		return e.ops[uid] != o || e.save(o) == nil
	})
	return len(e.unwritten) == 0
}

// forgetEvery is how often what is no longer needed is looked for: operations are kept longer by as much at the most.
const forgetEvery = 10 * time.Minute

// forget drops finished operations that are too old, and what is known of containers that went away otherwise than by
// kubelet's RemoveContainer, until ctx ends.
func (e *Engine) forget(ctx context.Context) {
	for {
		e.mu.Lock()
		err := e.expireLocked(time.Now())
		e.mu.Unlock()
		if err != nil {
			e.log.WithError(err).Warn("old operations stay in the journal")
		}
		if sleep(ctx, forgetEvery) != nil {
			return
		}
		if _, err := e.forgetRemoved(ctx); err != nil {
			e.log.WithError(err).Warn("records not tidied")
		}
		e.overrides.flush()
		e.forgetOverrides(ctx)
	}
}

// tidy forgets containers that went away while the proxy did not look, and takes care of those whose operation is lost. wg owns that.
// It is tried until the runtime lists its containers, and returns false if ctx ended before that.
func (e *Engine) tidy(ctx context.Context, wg *sync.WaitGroup) bool {
	defer e.clearLost(ctx, wg) // even after a panic: their slots are held
	e.forgetOverrides(ctx)
	if e.awaitJudged(ctx) != nil {
		return false
	}
	list, err := e.forgetRemoved(ctx)
	for wait := 200 * time.Millisecond; err != nil; wait = min(2*wait, 5*time.Second) {
		e.log.WithError(err).Warn("records not tidied; trying again")
		e.clearLost(ctx, wg) // does not wait for that
		if sleep(ctx, wait) != nil {
			return false
		}
		list, err = e.forgetRemoved(ctx)
	}
	e.judge(ctx, list) // what has come about since
	if err := e.switchover.RemoveStray(e.knows); err != nil {
		e.log.WithError(err).Warn("gates that no operation knows not removed")
	}
	return true
}

// forgetRemoved forgets containers that do not exist any more, and returns those that do.
func (e *Engine) forgetRemoved(ctx context.Context) ([]*runtimeapi.Container, error) {
	// What is recorded is read first: a container made between the two reads is in the list but not
	// in the records read, and stays.
	recorded := map[string]bool{}
	for _, id := range e.records.ids() {
		recorded[id] = true
	}
	list, err := e.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, c := range list.GetContainers() {
		delete(recorded, c.GetId())
	}
	for id := range recorded {
		e.records.Removed(id)
		e.view.Forget(id)
	}
	return list.GetContainers(), nil
}

// lateCreate is how long after the start of a process a CreateContainer of the one before, which was cut off, may still
// bring a container about: the runtime is then in the middle of it, which takes it milliseconds, seconds under load.
const lateCreate = 15 * time.Second

// submit accepts an operation: once it returns nil, the operation is in the journal. It takes req, and the credentials out of it.
func (e *Engine) submit(req *opsv1.RestartRequest, given environments, pod *opsv1.PodRef) (*operation, error) {
	o := newOperation(req, &opsv1.Operation{
		Uid: req.GetUid(), Kind: kindRestart, Pod: pod, Phase: opsv1.Phase_PHASE_PENDING,
		Requester: req.GetRequester(), CreateTime: timestamppb.Now(),
	}, make([]containerRecord, len(req.GetContainers())))
	for _, c := range req.GetContainers() {
		o.op.Containers = append(o.op.Containers, &opsv1.ContainerOperation{Name: c.GetName(), Image: c.GetImage(), Phase: opsv1.Phase_PHASE_PENDING})
	}
	o.credentials, req.Credentials = req.GetCredentials(), nil
	o.environments = given
	return e.accept(o)
}

// newOperation returns an operation without claims.
func newOperation(req *opsv1.RestartRequest, op *opsv1.Operation, containers []containerRecord) *operation {
	return &operation{
		req: req, op: op, containers: containers, claims: map[int]*interceptors.Claim{}, certain: map[string]bool{},
		changed: make(chan struct{}), cancelled: make(chan struct{}), released: make(chan struct{}), supplied: make(chan struct{}),
	}
}

// accept is submit for an operation of any kind.
func (e *Engine) accept(o *operation) (*operation, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, status.Error(codes.Unavailable, "cri-proxy is shutting down; try again")
	}
	if known := e.ops[o.req.GetUid()]; known != nil {
		return e.again(known, o)
	}
	active := e.activeLocked()
	if active >= maxActive {
		return nil, status.Errorf(codes.ResourceExhausted, "%d operations are unfinished on this node, which is the most it takes; wait for some to finish (cri-proxy ctl ops --active)", active)
	}
	if err := e.expireLocked(time.Now()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	o.mu.Lock()
	o.enterLocked()
	e.giveLocked(o, o.environments)
	o.mu.Unlock()
	if err := e.save(o); err != nil {
		o.mu.Lock()
		e.forgetEnvironmentsLocked(o)
		o.mu.Unlock()
		return nil, status.Errorf(codes.Internal, "the operation was not accepted and nothing was done: %v", err)
	}
	e.ops[o.req.GetUid()] = o
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
		if !o.finished() {
			n++
		}
	}
	return n
}

// activeOperations returns the operations that have not finished.
func (e *Engine) activeOperations() []*operation {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*operation
	for _, o := range e.ops {
		if !o.finished() {
			all = append(all, o)
		}
	}
	return all
}

// as returns the operation if it is what the other one would be.
func (o *operation) as(other *operation) (*operation, error) {
	if (o.upgrade == nil) != (other.upgrade == nil) || !sameRequest(o.req, other.req) || !sameUpgrade(o.upgrade, other.upgrade) {
		return nil, status.Errorf(codes.AlreadyExists, "operation %s exists with another request; choose a new UID", o.req.GetUid())
	}
	if len(other.credentials) > 0 {
		o.supply(other.credentials)
	}
	return o, nil
}

// sameRequest compares requests as commands; who asks is not part of that, nor is a pod
// UID that the first one left to us.
func sameRequest(a, b *opsv1.RestartRequest) bool {
	a, b = proto.Clone(a).(*opsv1.RestartRequest), proto.Clone(b).(*opsv1.RestartRequest)
	a.Requester, b.Requester = "", ""
	a.Credentials, b.Credentials = nil, nil
	if a.GetPod().GetUid() == "" || b.GetPod().GetUid() == "" {
		a.Pod.Uid, b.Pod.Uid = "", ""
	}
	return proto.Equal(a, b)
}

// lookup returns the operation, or nil.
func (e *Engine) lookup(uid string) *operation {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ops[uid]
}

// list returns all operations, newest first.
func (e *Engine) list() []*opsv1.Operation {
	e.mu.Lock()
	ops := make([]*operation, 0, len(e.ops))
	for _, o := range e.ops {
		ops = append(ops, o)
	}
	e.mu.Unlock()
	out := make([]*opsv1.Operation, 0, len(ops))
	for _, o := range ops {
		out = append(out, o.snapshot())
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
		if at, ok := o.finishedAt(); ok && !o.left {
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
	if err := e.journal.remove(gone); err != nil {
		return err
	}
	for _, uid := range gone {
		delete(e.ops, uid)
	}
	return nil
}

// save writes the operation to the journal.
func (e *Engine) save(o *operation) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return e.saveLocked(o)
}

func (e *Engine) saveLocked(o *operation) error {
	if o.op.GetFinishTime() == nil {
		o.op.Phase = o.phaseLocked()
	}
	op, err := proto.Marshal(o.op)
	if err != nil {
		return err
	}
	req, err := proto.Marshal(o.req)
	if err != nil {
		return err
	}
	r := &record{Boot: e.boot, Operation: op, Request: req, Containers: o.containers, Cancelled: o.cancelSaid, Committed: o.isReleased, Credentials: o.forgotten || len(o.credentials) > 0, Environments: o.had}
	if o.upgrade != nil {
		if r.Upgrade, err = proto.Marshal(o.upgrade); err != nil {
			return err
		}
	}
	return e.overrides.write(func(changes map[string][]byte) error { return e.journal.putWith(o.op.GetUid(), r, changes) })
}

// snapshot returns a copy that nobody changes.
func (o *operation) snapshot() *opsv1.Operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return proto.Clone(o.op).(*opsv1.Operation)
}

func (o *operation) finished() bool {
	_, ok := o.finishedAt()
	return ok
}

// finishedAt returns when the operation has finished; false if it has not.
func (o *operation) finishedAt() (time.Time, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	at := o.op.GetFinishTime()
	return at.AsTime(), at != nil
}

// watch returns the operation as it is and a channel that is closed when it changes.
func (o *operation) watch() (*opsv1.Operation, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return proto.Clone(o.op).(*opsv1.Operation), o.changed
}

// change edits the operation and tells watchers; it does not write the journal.
func (o *operation) change(f func(op *opsv1.Operation)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(o.op)
	o.notifyLocked()
}

func (o *operation) notifyLocked() {
	if o.op.GetFinishTime() == nil {
		o.op.Phase = o.phaseLocked()
	}
	o.enterLocked()
	close(o.changed)
	o.changed = make(chan struct{})
}

// phaseLocked is the phase of a running operation. An upgrade that is about to be taken back, because one of its containers has failed, is
// neither prepared nor armed, whatever the others are: its caller must not go on. The caller holds o.mu.
func (o *operation) phaseLocked() opsv1.Phase {
	phase := leastAdvanced(o.op.GetContainers())
	if o.upgrade != nil && phase == opsv1.Phase_PHASE_REVEALING {
		phase = opsv1.Phase_PHASE_ADOPTING // all have ended, which is later
	}
	if o.upgrade != nil && !o.committed && (o.cancelSaid || o.failedLocked()) &&
		slices.Index(course, phase) > slices.Index(course, opsv1.Phase_PHASE_STAGING) {
		return opsv1.Phase_PHASE_STAGING
	}
	return phase
}

// failedLocked reports whether a container has ended otherwise than well. The caller holds o.mu.
func (o *operation) failedLocked() bool {
	return slices.ContainsFunc(o.op.GetContainers(), func(c *opsv1.ContainerOperation) bool {
		return c.GetPhase() == opsv1.Phase_PHASE_FAILED || c.GetPhase() == opsv1.Phase_PHASE_CANCELLED
	})
}

// leastAdvanced is the least advanced phase of the containers that have not ended.
func leastAdvanced(cs []*opsv1.ContainerOperation) opsv1.Phase {
	least := len(course)
	for _, c := range cs {
		if i := slices.Index(course, c.GetPhase()); i >= 0 {
			least = min(least, i)
		}
	}
	if least == len(course) {
		return opsv1.Phase_PHASE_REVEALING // all have ended
	}
	return course[least]
}

// course are the phases of a container before it has ended, in order.
var course = []opsv1.Phase{
	opsv1.Phase_PHASE_UNSPECIFIED, opsv1.Phase_PHASE_PENDING, opsv1.Phase_PHASE_PULLING, opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_PREPARED,
	opsv1.Phase_PHASE_ARMED, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING, opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_ADOPTING,
}

// commit passes the point after which the operation cannot be cancelled; false if it has been cancelled before.
func (o *operation) commit() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case <-o.cancelled:
		return false
	default:
		o.committed = true
		return true
	}
}

// cancel cancels the operation unless it has been committed. Once it returns nil, the operation stays cancelled.
func (e *Engine) cancel(o *operation, reason string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.op.GetFinishTime() != nil || o.cancelSaid {
		return nil
	}
	if o.committed {
		return status.Errorf(codes.FailedPrecondition, "operation %s has begun to stop containers and runs to its end", o.op.GetUid())
	}
	return e.cancelLocked(o, reason)
}

// cancelLocked cancels an operation of which nothing has been stopped. The caller holds o.mu.
func (e *Engine) cancelLocked(o *operation, reason string) error {
	o.cancelSaid, o.op.Message = true, reason
	if err := e.saveLocked(o); err != nil {
		o.cancelSaid, o.op.Message = false, ""
		return status.Errorf(codes.Internal, "not cancelled: %v", err)
	}
	close(o.cancelled)
	return nil
}

// CancelAll cancels all operations that may still be cancelled, and does not wait for their end. It may be called before [Engine.Run].
func (e *Engine) CancelAll(reason string) {
	for _, op := range e.list() {
		o := e.lookup(op.GetUid())
		if o == nil || op.GetFinishTime() != nil {
			continue
		}
		log := e.log.WithFields(logrus.Fields{"op": op.GetUid(), "reason": reason})
		if err := e.cancel(o, reason); err != nil {
			log.WithError(err).Warn("operation not cancelled")
		} else {
			log.Info("operation cancelled")
		}
	}
}

// newToken returns a token that is known to this process.
func (e *Engine) newToken() string {
	token := randomToken()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tokens != nil {
		e.tokens[token] = true
	}
	return token
}

func (e *Engine) knows(token string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tokens[token]
}

// randomToken returns 32 random hexadecimal digits.
func randomToken() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

func podName(p *opsv1.PodRef) string { return p.GetNamespace() + "/" + p.GetName() }
