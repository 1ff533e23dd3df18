// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Operation is one operation in memory. Its methods may be called by anybody at any time.
type Operation struct {
	identity
	disk *store.Store

	mu         sync.Mutex       // guards all following fields
	op         *opsv1.Operation // the public state
	final      *opsv1.Operation // op once the journal has the end, until Conclude tells of it; else nil
	containers []store.Container
	changed    chan struct{} // closed and replaced at each change
	cancelled  chan struct{} // closed when the operation is cancelled
	cancelSaid bool          // cancelled is closed
	// pastPointOfNoReturn is set once something has been stopped, or is about to be.
	pastPointOfNoReturn bool
	committed           chan struct{} // closed when the caller of an upgrade commits it
	commitRequested     bool          // committed is closed
	// credentials are for the pulls; supplied is closed and replaced when there are new ones.
	credentials []*opsv1.RegistryCredential
	supplied    chan struct{}
	// forgotten is set if the process before this one had credentials, until there are new ones.
	forgotten    bool
	environments environments
	// certain has the containers of an upgrade whose successor is known to be what kubelet asks
	// for.
	certain map[string]bool
	claims  map[int]*view.Claim
	stays   []Stay // for metrics and traces
}

// New returns the operation of a command on a pod.
func New(c Command, pod *opsv1.PodRef, disk *store.Store) *Operation {
	op := &opsv1.Operation{
		Uid: c.Restart.GetUid(), Kind: opsv1.KindRestart, Pod: pod, Phase: opsv1.Phase_PHASE_PENDING,
		Requester: c.Restart.GetRequester(), CreateTime: timestamppb.Now(),
	}
	if c.Upgrade != nil {
		op.Kind = opsv1.KindUpgrade
	}
	for i, r := range c.Restart.GetContainers() {
		image := r.GetImage()
		if c.Upgrade != nil {
			image = c.Upgrade.GetContainers()[i].GetImage()
		}
		op.Containers = append(op.Containers, &opsv1.ContainerOperation{
			Name: r.GetName(), Image: image, Phase: opsv1.Phase_PHASE_PENDING,
		})
	}
	o := newOperation(c, op, disk)
	o.containers = make([]store.Container, len(op.Containers))
	return o
}

func newOperation(c Command, op *opsv1.Operation, disk *store.Store) *Operation {
	return &Operation{
		identity: identity{
			restart: c.Restart, upgrade: c.Upgrade, kind: op.GetKind(), pod: op.GetPod(), requester: op.GetRequester(),
			createTime: op.GetCreateTime().AsTime(),
		},
		credentials: c.Credentials, environments: environments{given: c.Environments},
		op: op, disk: disk, claims: map[int]*view.Claim{}, certain: map[string]bool{},
		changed: make(chan struct{}), cancelled: make(chan struct{}), committed: make(chan struct{}),
		supplied: make(chan struct{}),
	}
}

// Decode returns the operation of a record of the journal. It has no claims yet.
//
// Errors: the record cannot be decoded, or its parts do not fit together.
func Decode(uid string, r *store.Record, disk *store.Store) (*Operation, error) {
	op, c, err := decode(r)
	if err != nil {
		return nil, err
	}
	n := len(r.Containers)
	if n != len(op.GetContainers()) || n != len(c.Restart.GetContainers()) || uid != op.GetUid() ||
		c.Upgrade != nil && n != len(c.Upgrade.GetContainers()) {
		return nil, errors.New("the record does not hold together: was the file edited?")
	}
	o := newOperation(c, op, disk)
	o.containers = r.Containers
	o.forgotten, o.environments.had = r.Credentials, r.Environments
	o.rebooted = r.Boot != "" && disk.Boot != "" && r.Boot != disk.Boot
	if r.CommitRequested {
		o.commitRequested = true
		close(o.committed)
	}
	if op.GetFinishTime() != nil {
		return o, nil
	}
	if r.Cancelled {
		o.cancelSaid = true
		close(o.cancelled)
	}
	past := func(c store.Container) bool { return c.PastPointOfNoReturn() }
	o.pastPointOfNoReturn = slices.ContainsFunc(o.containers, past)
	return o, nil
}

// decode reads the messages of a record.
func decode(r *store.Record) (*opsv1.Operation, Command, error) {
	op, c := &opsv1.Operation{}, Command{Restart: &opsv1.RestartRequest{}}
	err := errors.Join(proto.Unmarshal(r.Operation, op), proto.Unmarshal(r.Request, c.Restart))
	if r.Upgrade != nil {
		c.Upgrade = &opsv1.PrepareUpgradeRequest{}
		err = errors.Join(err, proto.Unmarshal(r.Upgrade, c.Upgrade))
	}
	if err != nil {
		return nil, Command{}, fmt.Errorf("decoding: %w", err)
	}
	return op, c, nil
}

// LeftAlone returns an operation for a record of the journal that this binary does not understand:
// it is told of as one that has failed. r is nil if nothing of the record can be read, why says in
// words what is wrong with it. wasRunning is set if the operation has not finished.
func LeftAlone(uid string, r *store.Record, why string, disk *store.Store) (o *Operation, wasRunning bool) {
	op, c := &opsv1.Operation{Uid: uid}, Command{Restart: &opsv1.RestartRequest{Uid: uid}}
	if r != nil {
		known, command, err := decode(r)
		if err != nil { // the upgrade may be what cannot be read
			rest := *r
			rest.Upgrade = nil
			known, command, err = decode(&rest)
		}
		if err == nil && known.GetUid() == uid {
			op, c = known, command
		}
	}
	o = newOperation(c, op, disk)
	o.leftAlone = true
	if op.GetFinishTime() != nil {
		return o, false
	}
	op.Phase, op.FinishTime, op.Message = opsv1.Phase_PHASE_FAILED, timestamppb.Now(), why
	for _, c := range op.GetContainers() {
		if !HasEnded(c.GetPhase()) {
			c.Phase, c.Reason, c.Message = opsv1.Phase_PHASE_FAILED, opsv1.ReasonJournalVersion, why
		}
	}
	return o, true
}

// Accept writes a new operation down, with what its command has brought.
func (o *Operation) Accept() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.enterLocked()
	o.environments.give(o.environments.given, o.UID(), o.disk.Records)
	err := o.saveLocked()
	if err != nil {
		o.environments.forget(o.UID(), o.disk.Records)
	}
	return err
}

// Repeat takes a command that has been given once more. Its credentials and environments count for
// what is still to be done.
//
// Errors: AlreadyExists as a gRPC status, if the command asks for something else.
func (o *Operation) Repeat(c Command) error {
	if o.restart.GetPod() == nil { // it is left alone, and its command cannot be read
		return status.Errorf(codes.AlreadyExists, "operation %s exists (%s); choose a new UID",
			o.UID(), o.Snapshot().GetMessage())
	}
	if !(Command{Restart: o.restart, Upgrade: o.upgrade}).Same(c) {
		return status.Errorf(codes.AlreadyExists, "operation %s exists with another request; choose a new UID",
			o.UID())
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(c.Credentials) > 0 {
		o.credentials, o.forgotten = c.Credentials, false
		close(o.supplied)
		o.supplied = make(chan struct{})
	}
	if o.endLocked() == nil && !o.commitRequested {
		o.environments.give(c.Environments, o.UID(), o.disk.Records)
	}
	return nil
}

// Save writes the operation to the journal.
func (o *Operation) Save() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.saveLocked()
}

func (o *Operation) saveLocked() error {
	if o.op.GetFinishTime() == nil {
		o.op.Phase = o.phaseLocked()
	}
	op, err := proto.Marshal(o.latestLocked())
	if err != nil {
		return err
	}
	req, err := proto.Marshal(o.restart)
	if err != nil {
		return err
	}
	r := &store.Record{
		Operation: op, Request: req, Containers: o.containers, Cancelled: o.cancelSaid,
		CommitRequested: o.commitRequested,
		Credentials:     o.forgotten || o.final == nil && len(o.credentials) > 0, Environments: o.environments.had,
	}
	if o.upgrade != nil {
		if r.Upgrade, err = proto.Marshal(o.upgrade); err != nil {
			return err
		}
	}
	return o.disk.Save(o.op.GetUid(), r)
}

// Snapshot returns a copy of the public state that nobody changes.
func (o *Operation) Snapshot() *opsv1.Operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return proto.Clone(o.op).(*opsv1.Operation)
}

// Watch returns a copy of the public state and a channel that is closed when the state changes.
func (o *Operation) Watch() (*opsv1.Operation, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return proto.Clone(o.op).(*opsv1.Operation), o.changed
}

// Phase is the phase of an operation that has not finished.
func (o *Operation) Phase() opsv1.Phase {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.phaseLocked()
}

// Finished reports whether the operation has finished.
func (o *Operation) Finished() bool {
	_, ok := o.FinishedAt()
	return ok
}

// FinishedAt returns when the operation has finished; false if it has not.
func (o *Operation) FinishedAt() (time.Time, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	at := o.op.GetFinishTime()
	return at.AsTime(), at != nil
}

// Change edits the public state and tells watchers. It does not write the journal.
func (o *Operation) Change(f func(op *opsv1.Operation)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(o.latestLocked())
	o.notifyLocked()
}

// latestLocked is the public state that changes are made to, and that the journal gets.
func (o *Operation) latestLocked() *opsv1.Operation {
	if o.final != nil {
		return o.final
	}
	return o.op
}

// endLocked is the public state of an operation whose end is in the journal, or was to be; else
// nil.
func (o *Operation) endLocked() *opsv1.Operation {
	if latest := o.latestLocked(); latest.GetFinishTime() != nil {
		return latest
	}
	return nil
}

func (o *Operation) notifyLocked() {
	if o.op.GetFinishTime() == nil {
		o.op.Phase = o.phaseLocked()
	}
	o.enterLocked()
	close(o.changed)
	o.changed = make(chan struct{})
}

// PassPointOfNoReturn makes the operation one that cannot be cancelled any more. It returns false
// if the operation has been cancelled before.
func (o *Operation) PassPointOfNoReturn() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelSaid {
		return false
	}
	o.pastPointOfNoReturn = true
	return true
}

// Cancelled is closed when the operation is cancelled.
func (o *Operation) Cancelled() <-chan struct{} { return o.cancelled }

// IsCancelled reports whether the operation has been cancelled.
func (o *Operation) IsCancelled() bool {
	select {
	case <-o.cancelled:
		return true
	default:
		return false
	}
}

// Cancel cancels the operation. Once it returns nil, the operation has finished or stays cancelled.
//
// Errors: FailedPrecondition past the point of no return, Internal if the journal cannot be
// written; both as a gRPC status.
func (o *Operation) Cancel(reason string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.endLocked() != nil || o.cancelSaid {
		return nil
	}
	if o.pastPointOfNoReturn {
		return status.Errorf(codes.FailedPrecondition, "operation %s has begun to stop containers and runs to its end",
			o.op.GetUid())
	}
	return o.cancelLocked(reason)
}

// CancelUncommitted cancels an upgrade unless its caller has committed it, and reports whether it
// did.
func (o *Operation) CancelUncommitted(reason string) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.commitRequested || o.pastPointOfNoReturn || o.cancelSaid || o.endLocked() != nil {
		return false, nil
	}
	return true, o.cancelLocked(reason)
}

// cancelLocked cancels an operation that has stopped nothing. The caller holds o.mu.
func (o *Operation) cancelLocked(reason string) error {
	o.cancelSaid, o.op.Message = true, reason
	if err := o.saveLocked(); err != nil {
		o.cancelSaid, o.op.Message = false, ""
		return status.Errorf(codes.Internal, "not cancelled: %v", err)
	}
	close(o.cancelled)
	return nil
}

// Committed is closed when the caller of an upgrade commits it.
func (o *Operation) Committed() <-chan struct{} { return o.committed }

// CommitRequested reports whether the caller of an upgrade has committed it: the pod's spec may
// have been patched.
func (o *Operation) CommitRequested() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.commitRequested
}

// Commit lets a prepared upgrade go on, with what its caller says of its containers now.
//
// Errors: FailedPrecondition if the upgrade is not prepared, Internal if the journal cannot be
// written; both as a gRPC status.
func (o *Operation) Commit(now *opsv1.CommitUpgradeRequest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.commitRequested {
		return nil
	}
	refused := func(format string, args ...any) error {
		return status.Errorf(codes.FailedPrecondition, format, args...)
	}
	switch phase, end := leastAdvanced(o.op.GetContainers()), o.endLocked(); {
	case end != nil:
		return refused("upgrade %s has ended: %s", o.op.GetUid(), end.GetMessage())
	case o.cancelSaid || anyFailed(o.op.GetContainers()):
		return refused("upgrade %s is being taken back: %s", o.op.GetUid(), o.op.GetMessage())
	case phase != opsv1.Phase_PHASE_PREPARED:
		return refused("upgrade %s is not prepared yet: %s", o.op.GetUid(), PhaseName(phase))
	}
	for _, c := range now.GetEnvironments() {
		o.certain[c.GetName()] = true
		if env := c.GetEnvironment(); env != nil {
			o.environments.give(Environments{c.GetName(): env}, o.UID(), o.disk.Records)
		}
	}
	if c := now.GetCredentials(); len(c) > 0 {
		o.credentials = c
	}
	o.commitRequested = true
	if err := o.saveLocked(); err != nil {
		o.commitRequested = false
		return status.Errorf(codes.Internal, "not committed: %v", err)
	}
	close(o.committed)
	return nil
}

// Credentials returns the credentials for pulls. forgotten is set if the process before this one
// had some and this one has not; others is closed when there are new ones.
func (o *Operation) Credentials() (c []*opsv1.RegistryCredential, forgotten bool, others <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.credentials, o.forgotten, o.supplied
}

// Environment returns the environment that a command has brought for the container, to this process
// or to one before it; nil if there is none. lost is set if there was one and it is gone.
func (o *Operation) Environment(container string) (env *opsv1.Environment, lost bool) {
	o.mu.Lock()
	env, had := o.environments.given[container], slices.Contains(o.environments.had, container)
	o.mu.Unlock()
	if env == nil && had {
		env = o.disk.Records.Environment(o.UID(), container)
	}
	return env, env == nil && had
}

// finishedLocked returns the public state of the operation at its end; nil if a container has not
// ended.
func (o *Operation) finishedLocked() *opsv1.Operation {
	op := proto.Clone(o.op).(*opsv1.Operation)
	op.Phase = opsv1.Phase_PHASE_SUCCEEDED
	var messages []string
	for i, c := range op.GetContainers() {
		if o.containers[i].Step != store.StepDone {
			return nil
		}
		op.Phase = max(op.GetPhase(), c.GetPhase())
		if c.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			messages = append(messages, fmt.Sprintf("%s: %s", c.GetName(), c.GetMessage()))
		}
	}
	if slices.ContainsFunc(op.GetContainers(), func(c *opsv1.ContainerOperation) bool {
		return c.GetPhase() == opsv1.Phase_PHASE_FAILED
	}) {
		op.Phase = opsv1.Phase_PHASE_FAILED // says more than that others were cancelled
	}
	op.FinishTime = timestamppb.Now()
	if len(messages) > 0 {
		op.Message = strings.Join(messages, "; ")
	}
	return op
}

// Conclude marks the operation finished if all its containers have ended, and calls ended before
// watchers are told. ended must not call the operation. Conclude writes the end, unless
// [Container.End] has. It returns the journal's error if the end could not be written; the
// operation is finished anyway.
func (o *Operation) Conclude(ended func(op *opsv1.Operation, stays []Stay)) (err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	op, isWritten := o.final, o.final != nil
	if !isWritten {
		op = o.finishedLocked()
	}
	if op == nil {
		return nil // the process ends, and the next one goes on
	}
	o.op, o.final = op, nil
	o.credentials = nil
	o.environments.forget(o.UID(), o.disk.Records)
	if !isWritten {
		err = o.saveLocked()
	}
	o.enterLocked()
	ended(o.op, o.stays)
	o.notifyLocked()
	return err
}
