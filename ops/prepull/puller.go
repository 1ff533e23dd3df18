// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/prepull/claims"
	"github.com/cri-proxy/cri-proxy/ops/prepull/credentialprovider"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

const (
	// maxActive bounds unfinished pulls: a list job has at most 255 images.
	maxActive = 1024
	// Finished pulls are answered for an hour. What was fetched for a pull that did not succeed is
	// kept as long.
	keepFinished = time.Hour
	maxFinished  = 2000

	sweepInterval = time.Minute

	// credentialsTimeout is how long after a restart a pull waits for its credentials.
	credentialsTimeout = time.Hour
)

// Options configures a [Puller]. Registerer and Tracer may be nil; StateDir, Conn and Log are
// required.
type Options struct {
	// StateDir holds the file of pulls and pins; it must exist.
	StateDir string
	// Conn is the connection to the runtime.
	Conn grpc.ClientConnInterface
	Log  logrus.FieldLogger
	// Registerer gets the puller's metrics.
	Registerer prometheus.Registerer
	// Tracer makes spans of finished pulls. Nil: none.
	Tracer trace.Tracer
	// Parallel is how many images are pulled at the same time; 0 means 1.
	Parallel int
	// BytesPerSecond bounds every pull that does not say otherwise; 0 means no bound.
	BytesPerSecond int64
	// HostsDir is the config_path of containerd's registry configuration. Empty means
	// /etc/containerd/certs.d.
	HostsDir string
	// Hosts says how registries are reached. Nil: HostsDir alone says it.
	Hosts registry.Hosts
	// Plugins are kubelet's credential provider plugins; nil for none.
	Plugins *credentialprovider.Plugins
	// VerifyAccess has kubelet pull for itself what was pulled here with secrets: see
	// [Puller.Unclaimed].
	VerifyAccess bool
	// MaxDiskPercent is how full a pull that nobody waits for may make the image file system; 0
	// means that nobody looks at it.
	MaxDiskPercent float64
	// HighThreshold returns kubelet's imageGCHighThresholdPercent, which then counts instead of
	// MaxDiskPercent. Nil: MaxDiskPercent counts.
	HighThreshold func() int
}

// Puller pulls images and keeps their pins.
type Puller struct {
	log      logrus.FieldLogger
	images   runtimeapi.ImageServiceClient
	runtime  runtimeapi.RuntimeServiceClient
	store    *imagestore.Store
	journal  *journal
	parallel int
	limit    int64
	lookUp   *registry.LookUp
	plugins  *credentialprovider.Plugins
	disk     *imagefs.Guard
	claims   *claims.Claims // nil: kubelet is shown all images
	pins     *pins.Pins
	metrics  *metrics
	tracer   trace.Tracer // nil: off
	opened   time.Time
	wake     chan struct{} // Run looks for work
	yielder  *yielder

	leasing sync.Mutex // held while a lease is created, or found unwanted and ended

	mu     sync.Mutex // guards all following fields, the pulls, and the yielder's line
	pulls  map[string]*pull
	closed bool
}

// Open reads the pulls and pins of the state directory. [Puller.Run] goes on with them.
//
// Errors: another process holds the file, or this process may not open it.
func Open(o Options) (*Puller, error) {
	p := &Puller{
		log:     o.Log.WithField("component", "prepull"),
		images:  runtimeapi.NewImageServiceClient(o.Conn),
		runtime: runtimeapi.NewRuntimeServiceClient(o.Conn),
		store:   imagestore.New(o.Conn), parallel: max(1, o.Parallel), limit: o.BytesPerSecond, plugins: o.Plugins,
		tracer: o.Tracer, opened: time.Now(), wake: make(chan struct{}, 1), pulls: map[string]*pull{},
	}
	p.disk = &imagefs.Guard{
		Images: p.images, MaxPercent: o.MaxDiskPercent, HighThreshold: o.HighThreshold, Statfs: unix.Statfs,
	}
	p.yielder = newYielder(p)
	hosts := o.Hosts
	if hosts == nil {
		hosts = registry.HostsFrom(o.HostsDir)
	}
	p.lookUp = registry.NewLookUp(hosts)
	var had *kept
	var err error
	if p.journal, had, err = openJournal(o.StateDir, p.log); err != nil {
		return nil, err
	}
	p.pins = pins.New(p.images, p.store, p.journal, had.pins)
	if o.VerifyAccess {
		p.claims = claims.New(p.log, p.images, p.journal, had.unclaimed)
	}
	for uid, r := range had.pulls {
		if err := p.revive(r); err != nil {
			p.log.WithField("op", uid).WithError(err).Error("pull cannot be read, left out")
		}
	}
	if p.metrics, err = newMetrics(o.Registerer, p); err != nil {
		return nil, errors.Join(err, p.journal.Close())
	}
	return p, nil
}

// revive takes up a pull of an earlier process.
func (p *Puller) revive(r *record) error {
	u := &pull{
		req: &opsv1.PullRequest{}, op: &opsv1.PullOperation{}, wants: r.Credentials, private: r.Private, had: r.Had,
		changed: make(chan struct{}),
	}
	if err := errors.Join(proto.Unmarshal(r.Request, u.req), proto.Unmarshal(r.Operation, u.op)); err != nil {
		return err
	}
	named, err := registry.Normalize(u.req.GetImage())
	if err != nil {
		return err
	}
	u.named, u.key = named, keyOf(named, u.req)
	u.op.MaxAttempts = u.attempts() // an earlier version does not write it
	u.op.RetryAfter = nil           // the next attempt begins when there is a place for it
	if !u.finished() {
		u.op.Phase, u.op.Reason = opsv1.PullPhase_PULL_WAITING, opsv1.PullReasonInQueue
		if u.wants {
			u.op.Reason = opsv1.PullReasonCredentialsNeeded
			u.op.Message = "cri-proxy was restarted and does not keep credentials: waiting for the command to be " +
				"repeated"
		}
	}
	p.pulls[u.op.GetUid()] = u
	if u.private && u.op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
		p.claims.Revive(u.op.GetUid(), u.named.String(), u.had, u.finished())
	}
	return nil
}

// Run pulls until ctx ends. What is under way then goes on in the next process.
func (p *Puller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { guard.Keep(ctx, p.log, func() { (&sweeper{p}).run(ctx) }) })
	wg.Go(func() { guard.Keep(ctx, p.log, func() { p.yielder.watch(ctx) }) })
	for {
		wait := time.Minute // after a panic
		guard.Do(p.log, func() { wait = p.startSome(ctx, &wg) })
		timer := time.NewTimer(wait)
		select {
		case <-p.wake:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		timer.Stop()
	}
}

// Close releases the file. Run must have returned.
func (p *Puller) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	return p.journal.Close()
}

// nudge has Run look for work.
func (p *Puller) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// KubeletPulls says that kubelet pulls an image, until done is called; an empty name means that the
// image is not known. Our pulls may have to give way. What they have fetched stays, so that
// kubelet's goes on from there at full speed if it needs the same.
func (p *Puller) KubeletPulls(image string) (done func()) { return p.yielder.kubelet.Begin(image) }

// AnyUnclaimed reports whether there may be an image for [Puller.Unclaimed].
func (p *Puller) AnyUnclaimed() bool { return p.claims.Any() }

// Unclaimed reports whether kubelet is to be told that the image is not there.
func (p *Puller) Unclaimed(image *runtimeapi.Image) bool { return p.claims.Hides(image) }

// Claimed says that kubelet has pulled the image.
func (p *Puller) Claimed(imageID string) { p.claims.Claimed(imageID) }

// Pin keeps an image that is on the node from kubelet's image garbage collection; see
// [pins.Pins.Pin].
func (p *Puller) Pin(ctx context.Context, image, owner string, until time.Time) error {
	return p.pins.Pin(ctx, image, owner, until)
}

// take accepts a pull, or returns the one that there is. urgent says that something on the node
// waits for the pull. That must be known before anything of the pull begins, because it decides
// what the pull may do.
func (p *Puller) take(req *opsv1.PullRequest, urgent bool) (*opsv1.PullOperation, error) {
	named, err := registry.Normalize(req.GetImage())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	credentials := req.GetCredentials()
	req = proto.Clone(req).(*opsv1.PullRequest)
	req.Credentials = nil

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, status.Error(codes.Unavailable, "cri-proxy is shutting down; try again")
	}
	if known := p.pulls[req.GetUid()]; known != nil {
		if !proto.Equal(known.req, req) {
			return nil, status.Errorf(codes.AlreadyExists,
				"pull %s exists with another request; choose a new UID", req.GetUid())
		}
		if urgent {
			p.hurryLocked(known)
		}
		p.giveLocked(known, credentials)
		return proto.Clone(known.op).(*opsv1.PullOperation), nil
	}
	active := 0
	for _, u := range p.pulls {
		if !u.finished() {
			active++
		}
	}
	if active >= maxActive {
		return nil, status.Errorf(codes.ResourceExhausted,
			"%d pulls are unfinished on this node, which is the most it takes; wait for some to finish", active)
	}
	u := &pull{
		req: req, named: named, key: keyOf(named, req), urgent: urgent,
		credentials: credentials, wants: len(credentials) > 0, changed: make(chan struct{}),
		op: &opsv1.PullOperation{
			Uid: req.GetUid(), Image: req.GetImage(), Resolved: named.String(), Owner: req.GetOwner(),
			Phase: opsv1.PullPhase_PULL_WAITING, Reason: opsv1.PullReasonInQueue, CreateTime: timestamppb.Now(),
		},
	}
	u.op.MaxAttempts = u.attempts()
	p.expireLocked(time.Now())
	if err := p.saveLocked(u); err != nil {
		return nil, status.Errorf(codes.Internal, "the pull was not accepted: %v", err)
	}
	p.pulls[req.GetUid()] = u
	p.nudge()
	return proto.Clone(u.op).(*opsv1.PullOperation), nil
}

// giveLocked gives an unfinished pull the credentials of a repeated command. The caller holds p.mu.
func (p *Puller) giveLocked(u *pull, credentials []*opsv1.RegistryCredential) {
	if u.finished() || len(credentials) == 0 {
		return
	}
	if !registry.SameCredentials(u.credentials, credentials) {
		u.credentials = credentials
		if u.given++; u.denied {
			u.retryAt = time.Time{} // the registry has refused others
		}
	}
	if !u.wants {
		u.wants = true
		if err := p.saveLocked(u); err != nil {
			p.log.WithFields(u.fields()).WithError(err).Warn("that the pull has credentials is not written")
		}
	}
	p.nudge()
}

// cancel ends a pull. reason is for people; code is for programs and may be empty.
func (p *Puller) cancel(uid, reason, code string) (*opsv1.PullOperation, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.pulls[uid]
	if u == nil {
		return nil, nil, noPull(uid)
	}
	if !u.finished() {
		u.cancelled, u.cancelCode = reason, code
		if u.stop != nil {
			u.stop(errCancelled)
		} else {
			p.cancelLocked(u)
		}
	}
	return proto.Clone(u.op).(*opsv1.PullOperation), u.changed, nil
}

// watch returns the pull as it is, and a channel that is closed at its next change.
func (p *Puller) watch(uid string) (*opsv1.PullOperation, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.pulls[uid]
	if u == nil {
		return nil, nil, noPull(uid)
	}
	return proto.Clone(u.op).(*opsv1.PullOperation), u.changed, nil
}

// list returns the pulls, newest first.
func (p *Puller) list(activeOnly bool) []*opsv1.PullOperation {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*opsv1.PullOperation
	for _, u := range p.pulls {
		if activeOnly && u.finished() {
			continue
		}
		op := proto.Clone(u.op).(*opsv1.PullOperation)
		op.Layers = nil
		out = append(out, op)
	}
	slices.SortFunc(out, func(a, b *opsv1.PullOperation) int {
		return b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime())
	})
	return out
}

func noPull(uid string) error {
	return status.Errorf(codes.NotFound, "no pull %q on this node; finished ones are kept for %s", uid, keepFinished)
}

// finishLocked ends the operation. The caller holds p.mu.
func (p *Puller) finishLocked(u *pull, phase opsv1.PullPhase, reason, message string) {
	succeeded := phase == opsv1.PullPhase_PULL_SUCCEEDED
	u.op.Phase, u.op.Reason, u.op.Message = phase, reason, u.endLocked(succeeded, message)
	u.op.BytesPerSecond, u.op.RetryAfter, u.op.LastFailure = 0, nil, nil
	u.op.FinishTime = timestamppb.Now()
	p.claims.End(u.op.GetUid(), succeeded)
	u.credentials = nil
	if err := p.saveLocked(u); err != nil {
		p.log.WithFields(u.fields()).WithError(err).Error("end of pull not written")
	}
	p.metrics.finished(u.op)
	traceEnd(p.tracer, u.op, u.req.GetImage())
	p.log.WithFields(u.fields()).WithFields(logrus.Fields{"phase": phase, "reason": reason}).Info("pull finished")
	u.notifyLocked()
}

// failLocked ends the operation as failed. The caller holds p.mu.
func (p *Puller) failLocked(u *pull, reason, format string, args ...any) {
	p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, reason, fmt.Sprintf(format, args...))
}

// cancelLocked ends a pull that somebody has cancelled. The caller holds p.mu.
func (p *Puller) cancelLocked(u *pull) {
	u.op.CancelCode = u.cancelCode
	p.finishLocked(u, opsv1.PullPhase_PULL_CANCELLED, opsv1.PullReasonCancelled, u.cancelled)
}

// keepLocked writes how many attempts there have been. The caller holds p.mu.
func (p *Puller) keepLocked(u *pull) {
	if err := p.saveLocked(u); err != nil {
		p.log.WithFields(u.fields()).WithError(err).Warn("attempts of pull not written")
	}
}

func (p *Puller) saveLocked(u *pull) error {
	req, err := proto.Marshal(u.req)
	if err != nil {
		return err
	}
	op, err := proto.Marshal(u.op)
	if err != nil {
		return err
	}
	return p.journal.putPull(u.op.GetUid(), &record{
		Request: req, Operation: op, Credentials: u.wants, Private: u.private, Had: u.had,
	})
}
