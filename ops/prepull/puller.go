// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/prepull/credentialprovider"
)

const (
	// maxActive bounds unfinished pulls: a list job has at most 255 images.
	maxActive = 1024
	// finished pulls are answered for an hour, and what was fetched for one that did not succeed is kept as long.
	keepFinished = time.Hour
	maxFinished  = 2000

	sweepEvery = time.Minute

	// credentialsPatience is how long after a restart a pull waits for its credentials.
	credentialsPatience = time.Hour
)

// Options configures a [Puller]. Registerer and Tracer may be nil; StateDir, Conn and Log are required.
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
	// HostsDir is the config_path of containerd's registry configuration. Empty means /etc/containerd/certs.d.
	HostsDir string
	// Hosts says how registries are reached; nil is by HostsDir alone.
	Hosts Hosts
	// Plugins are kubelet's credential provider plugins; nil for none.
	Plugins *credentialprovider.Plugins
	// VerifyAccess has kubelet pull for itself what was pulled here with secrets: see [Puller.Unclaimed].
	VerifyAccess bool
	// MaxDiskPercent is how full a pull that nobody waits for may make the image file system; 0 means that it is not looked at.
	MaxDiskPercent float64
	// HighThreshold returns kubelet's imageGCHighThresholdPercent, and counts in the place of MaxDiskPercent. Nil: that counts.
	HighThreshold func() int
}

// Puller pulls images and keeps their pins.
type Puller struct {
	log      logrus.FieldLogger
	images   runtimeapi.ImageServiceClient
	runtime  runtimeapi.RuntimeServiceClient
	store    *store
	journal  *journal
	parallel int
	limit    int64
	hosts    Hosts
	plugins  *credentialprovider.Plugins
	maxDisk  float64
	high     func() int // nil: maxDisk counts
	statfs   func(path string, fs *unix.Statfs_t) error
	verify   bool
	claims   *claims
	metrics  *metrics
	tracer   trace.Tracer // nil: off
	opened   time.Time
	wake     chan struct{} // Run looks for work

	unreached unreached // registries that are not looked up for a while

	kubelet *kubeletPulls
	leasing sync.Mutex // held while a lease is made sure of, or found unwanted and ended
	pinning sync.Mutex // held while the pins of images change

	mu     sync.Mutex // guards all following fields and the pulls
	way    way
	pulls  map[string]*pull
	pins   map[pinKey]*pin
	closed bool
}

// pull is one operation. Its fields are guarded by Puller.mu but for req, named and key, which do not change.
type pull struct {
	req   *opsv1.PullRequest // without credentials
	named reference.Named
	key   string // pulls with the same key fetch the same

	op          *opsv1.PullOperation
	credentials []*opsv1.RegistryCredential
	// wants is set when the operation came with credentials, which an earlier process had.
	wants bool
	// private is set when credentials have been used, and had is the ID that the image's name led to before that.
	private bool
	had     string
	retryAt time.Time
	// given counts the credentials that have come, each set once. failed is the reason for which the pull waits for its next attempt, denied
	// is set if that is one of its credentials.
	given  int
	failed string
	denied bool
	// urgent is set when something on the node waits for this very operation, which decides for itself whether to ask again; apart when it runs in a place
	// of those.
	urgent, apart bool
	// cut is set when the attempt that runs has been cut off for kubelet.
	cut bool
	// aside and free are how it gives way to a pull of kubelet's that wants layers of it.
	aside aside
	free  time.Time
	// limiter slows down the attempt that runs; nil: nothing does. slots is set while the runtime fetches for it.
	limiter atomic.Pointer[rate.Limiter]
	slots   atomic.Bool
	stop    context.CancelCauseFunc // ends the attempt that runs; nil without
	// cancelled is why the pull is to end, once somebody has asked for it, and cancelCode the code of that.
	cancelled, cancelCode string
	changed               chan struct{} // closed and replaced at each change

	// unlimited says that the speed limit is not kept, and why; unlimitedFrom is BytesFetched when that began.
	unlimited     string
	unlimitedFrom int64
}

// Why an attempt is ended.
var (
	errYield     = errors.New("kubelet pulls")
	errCancelled = errors.New("cancelled")
	errTimeout   = errors.New("the attempt took too long")
	errDeadline  = errors.New("the deadline has passed")
)

// Open reads the pulls and pins of the state directory. [Puller.Run] goes on with them.
//
// Errors: the file is held by another process or is not permitted to this one.
func Open(o Options) (*Puller, error) {
	p := &Puller{
		log: o.Log.WithField("component", "prepull"), images: runtimeapi.NewImageServiceClient(o.Conn), runtime: runtimeapi.NewRuntimeServiceClient(o.Conn), store: newStore(o.Conn),
		parallel: max(1, o.Parallel), limit: o.BytesPerSecond, hosts: o.Hosts, plugins: o.Plugins, maxDisk: o.MaxDiskPercent,
		high: o.HighThreshold, statfs: unix.Statfs,
		tracer: o.Tracer, verify: o.VerifyAccess, claims: newClaims(), opened: time.Now(), kubelet: newKubeletPulls(), wake: make(chan struct{}, 1), pulls: map[string]*pull{}, pins: map[pinKey]*pin{},
	}
	if p.hosts == nil {
		p.hosts = hostsFrom(o.HostsDir)
	}
	var before *kept
	var err error
	if p.journal, before, err = openJournal(o.StateDir, p.log); err != nil {
		return nil, err
	}
	maps.Copy(p.pins, before.pins)
	if p.verify {
		for _, id := range before.unclaimed {
			p.claims.add(id)
		}
	}
	for uid, r := range before.pulls {
		if err := p.revive(r); err != nil {
			p.log.WithField("op", uid).WithError(err).Error("pull cannot be read, left out")
		}
	}
	if p.metrics, err = newMetrics(o.Registerer, p); err != nil {
		return nil, errors.Join(err, p.journal.Close())
	}
	return p, nil
}

func (p *Puller) revive(r *record) error {
	u := &pull{req: &opsv1.PullRequest{}, op: &opsv1.PullOperation{}, wants: r.Credentials, private: r.Private, had: r.Had, changed: make(chan struct{})}
	if err := errors.Join(proto.Unmarshal(r.Request, u.req), proto.Unmarshal(r.Operation, u.op)); err != nil {
		return err
	}
	named, err := normalize(u.req.GetImage())
	if err != nil {
		return err
	}
	u.named, u.key = named, keyOf(named, u.req)
	u.op.MaxAttempts = u.attempts() // an earlier version does not write it
	u.op.RetryAfter = nil           // the next attempt begins when there is a place for it
	if u.op.GetFinishTime() == nil {
		u.op.Phase, u.op.Reason = opsv1.PullPhase_PULL_WAITING, opsv1.PullReasonInQueue
		if u.wants {
			u.op.Reason, u.op.Message = opsv1.PullReasonCredentialsNeeded, "cri-proxy was restarted and does not keep credentials: waiting for the command to be repeated"
		}
	}
	p.pulls[u.op.GetUid()] = u
	p.reviveClaim(u)
	return nil
}

func keyOf(named reference.Named, req *opsv1.PullRequest) string {
	return named.String() + "|" + req.GetRuntimeHandler()
}

// Run pulls until ctx ends. What is under way then goes on in the next process.
func (p *Puller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { guard.Keep(ctx, p.log, func() { p.sweepUntil(ctx) }) })
	wg.Go(func() { p.keepWatching(ctx) })
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

func (p *Puller) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// urgentParallel is how many pulls that something on the node waits for run beside the others: they must not
// stand behind a pull that takes its time because nobody waits for it.
const urgentParallel = 2

// startSome starts what may start and returns when there may be more.
func (p *Puller) startSome(ctx context.Context, wg *sync.WaitGroup) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	next := time.Hour
	var running, urgent int
	busy := map[string]string{}
	backOff, tooMany := map[string]time.Time{}, map[string]time.Time{} // until when others of the image wait as well, and those that are urgent
	var waiting []*pull
	for _, u := range p.pulls {
		switch {
		case u.op.GetFinishTime() != nil:
		case u.stop != nil:
			if u.apart {
				urgent++
			} else {
				running++
			}
			busy[u.key] = u.op.GetUid()
		default:
			waiting = append(waiting, u)
			// A registry that wants to be left alone does not care for whom; that it was out of reach may have been so for one alone, with
			// its limit or its time, and one attempt more does not hurt it where somebody waits. What else went wrong was that pull's own.
			switch u.failed {
			case opsv1.PullReasonTooManyRequests:
				tooMany[u.key] = later(tooMany[u.key], u.retryAt)
				backOff[u.key] = later(backOff[u.key], u.retryAt)
			case opsv1.PullReasonRegistryUnavailable, opsv1.PullReasonTimeout:
				backOff[u.key] = later(backOff[u.key], u.retryAt)
			}
		}
	}
	slices.SortFunc(waiting, func(a, b *pull) int {
		if a.urgent != b.urgent {
			return map[bool]int{true: -1, false: 1}[a.urgent]
		}
		return a.op.GetCreateTime().AsTime().Compare(b.op.GetCreateTime().AsTime())
	})
	for _, u := range waiting {
		if by, ok := u.deadline(); ok {
			if !now.Before(by) {
				p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, opsv1.PullReasonDeadlineExceeded, "not pulled within its deadline: "+u.op.GetMessage())
				continue
			}
			next = min(next, by.Sub(now))
		}
		others := backOff[u.key]
		if u.urgent {
			others = tooMany[u.key]
		}
		switch leader := busy[u.key]; {
		case u.op.GetAttempt() >= u.attempts(): // revived
			p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, opsv1.PullReasonInternalError, fmt.Sprintf(
				"cri-proxy has ended in the middle of attempt %d of %d: if nobody has killed it, the journal of its unit says why", u.op.GetAttempt(), u.attempts()))
		case u.wants && u.credentials == nil:
			if by := p.opened.Add(credentialsPatience); now.Before(by) {
				next = min(next, by.Sub(now))
			} else {
				p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, opsv1.PullReasonCredentialsNeeded, fmt.Sprintf("cri-proxy was restarted, and nobody has repeated the command with its credentials for %s", credentialsPatience))
			}
		case now.Before(others), now.Before(u.retryAt):
			next = min(next, later(others, u.retryAt).Sub(now))
			if !now.Before(u.retryAt) {
				u.op.LastFailure = nil
				u.waitLocked(opsv1.PullReasonBackOff, "another pull of the image has just failed")
			}
		case leader != "":
			if u.urgent {
				p.overtakenLocked(u, p.pulls[leader])
			}
			u.followLocked(p.pulls[leader].op)
			next = min(next, progressEvery)
		case p.asideLocked(u) != "":
			u.waitLocked(opsv1.PullReasonYieldsToKubelet, p.asideLocked(u))
		case u.urgent && urgent < urgentParallel:
			urgent++
			busy[u.key] = u.op.GetUid()
			u.apart = true
			p.startLocked(ctx, wg, u)
		case running >= p.parallel && u.urgent:
			u.waitLocked(opsv1.PullReasonInQueue, fmt.Sprintf("%d pulls that something waits for and %d of %d others at once are under way", urgent, running, p.parallel))
		case running >= p.parallel:
			u.waitLocked(opsv1.PullReasonInQueue, fmt.Sprintf("%d of %d pulls at once are under way", running, p.parallel))
		default: // an urgent one too, when there are more of these than places for them
			running++
			busy[u.key] = u.op.GetUid()
			p.startLocked(ctx, wg, u)
		}
	}
	return max(next, 10*time.Millisecond)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (u *pull) deadline() (time.Time, bool) {
	if d := u.req.GetDeadline().AsDuration(); d > 0 {
		return u.op.GetCreateTime().AsTime().Add(d), true
	}
	return time.Time{}, false
}

// waitLocked says why the pull waits.
func (u *pull) waitLocked(reason, message string) {
	if u.op.GetPhase() == opsv1.PullPhase_PULL_WAITING && u.op.GetReason() == reason && u.op.GetMessage() == message {
		return
	}
	u.op.Phase, u.op.Reason, u.op.Message, u.op.BytesPerSecond = opsv1.PullPhase_PULL_WAITING, reason, message, 0
	u.op.RetryAfter, u.op.LimitNotKept = nil, ""
	u.notifyLocked()
}

// backOffLocked says why the last attempt failed, and that the next one begins after wait; 0: at once.
func (u *pull) backOffLocked(f *failure, wait time.Duration) {
	when := "at once, with other credentials"
	if wait > 0 {
		when = fmt.Sprintf("in %s", wait)
	}
	u.op.LastFailure = &opsv1.AttemptFailure{Reason: f.reason, Message: f.message}
	u.waitLocked(opsv1.PullReasonBackOff,
		fmt.Sprintf("attempt %d of %d %s: %s: %s", u.op.GetAttempt()+1, u.attempts(), when, f.reason, f.message))
	if wait > 0 {
		u.op.RetryAfter = durationpb.New(wait)
	}
}

// followLocked shows the progress of another pull of the same image.
func (u *pull) followLocked(leader *opsv1.PullOperation) {
	u.op.Phase, u.op.Reason, u.op.Message = leader.GetPhase(), "", "another pull of the image is under way: "+leader.GetUid()
	u.op.BytesDone, u.op.BytesTotal, u.op.BytesPerSecond, u.op.Layers = leader.GetBytesDone(), leader.GetBytesTotal(), leader.GetBytesPerSecond(), leader.GetLayers()
	u.op.RetryAfter, u.op.LimitNotKept = nil, ""
	if transfers(u.op) {
		u.op.LastFailure = nil
	}
	u.notifyLocked()
}

// transfers reports whether bytes of the image come, or all have come.
func transfers(op *opsv1.PullOperation) bool {
	return op.GetPhase() == opsv1.PullPhase_PULL_FETCHING || op.GetPhase() == opsv1.PullPhase_PULL_UNPACKING
}

func (u *pull) notifyLocked() {
	close(u.changed)
	u.changed = make(chan struct{})
}

// startLocked begins an attempt.
func (p *Puller) startLocked(ctx context.Context, wg *sync.WaitGroup, u *pull) {
	attempt, stop := context.WithCancelCause(ctx)
	u.stop, u.cut = stop, false
	u.op.Attempt++
	if u.op.StartTime == nil {
		u.op.StartTime = timestamppb.Now()
	}
	u.op.Phase, u.op.Reason, u.op.Message = opsv1.PullPhase_PULL_RESOLVING, "", ""
	u.op.RetryAfter, u.op.LimitNotKept = nil, ""
	p.keepLocked(u) // one that this process does not survive counts
	u.notifyLocked()
	p.kubelet.wake() // it may have been pulling for a while
	timeout, credentials, given := u.timeout(), u.credentials, u.given
	by, bound := u.deadline()
	wg.Go(func() {
		defer stop(nil)
		limited, cancel := context.WithTimeoutCause(attempt, timeout, errTimeout)
		defer cancel()
		if bound {
			limited, cancel = context.WithDeadlineCause(limited, by, errDeadline)
			defer cancel()
		}
		log := p.log.WithFields(u.fields())
		err := guard.Try(log, func() error { return p.attempt(limited, u, credentials) })
		if !guard.Do(log, func() { p.settle(ctx, u, given, err, context.Cause(limited)) }) {
			guard.Do(log, func() { p.giveUp(u) })
		}
		p.nudge()
	})
}

// giveUp ends a pull whose attempts cannot be settled.
func (p *Puller) giveUp(u *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u.stop, u.apart = nil, false
	if u.op.GetFinishTime() == nil {
		p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, opsv1.PullReasonInternalError, "cri-proxy met a bug of its own; its log says where, please report it")
	}
}

// settle decides what follows an attempt, which was made with the credentials that were given as the count says.
func (p *Puller) settle(ctx context.Context, u *pull, given int, err, cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u.stop, u.apart, u.failed, u.denied = nil, false, "", false
	u.limiter.Store(nil)
	u.slots.Store(false)
	if err == nil {
		return // finished by attempt
	}
	host, _ := registryOf(u.named)
	f := explain(err, host)
	switch {
	case u.cancelled != "": // whatever else has ended the attempt
		p.cancelLocked(u)
		return
	case errors.Is(cause, errYield), errors.Is(cause, errOvertaken):
		p.yieldedLocked(u)
		return
	case errors.Is(cause, errDeadline):
		p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, opsv1.PullReasonDeadlineExceeded, "not pulled within its deadline; "+p.soFar(u))
		return
	case ctx.Err() != nil: // shutting down
		u.op.Attempt--
		p.keepLocked(u)
		return
	case errors.Is(cause, errTimeout):
		f = &failure{reason: opsv1.PullReasonTimeout, message: fmt.Sprintf("an attempt may take %s, and %s; give it longer for a large image or a slow network (timeoutSeconds of a job)", u.timeout(), p.soFar(u))}
	}
	p.log.WithFields(u.fields()).WithField("reason", f.reason).WithField("attempt", u.op.GetAttempt()).Warn(f.message)
	if f.credentials && given != u.given { // others have come since
		u.op.Attempt--
		p.keepLocked(u)
		u.backOffLocked(f, 0)
		return
	}
	if f.final || f.credentials && u.urgent || u.op.GetAttempt() >= u.attempts() {
		message := f.message
		if n := u.op.GetAttempt(); n > 1 {
			message = fmt.Sprintf("%s; %d attempts", message, n)
		}
		p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, f.reason, message)
		return
	}
	wait := opsv1.PullBackOff(u.op.GetAttempt())
	u.retryAt, u.failed, u.denied = time.Now().Add(wait), f.reason, f.credentials
	u.backOffLocked(f, wait)
}

func (u *pull) timeout() time.Duration {
	if d := u.req.GetAttemptTimeout().AsDuration(); d > 0 {
		return d
	}
	return opsv1.DefaultAttemptTimeout
}

func (u *pull) attempts() int32 {
	if n := u.req.GetMaxAttempts(); n > 0 {
		return n
	}
	return opsv1.DefaultAttempts
}

// soFar says how far the pull is.
func (p *Puller) soFar(u *pull) string {
	if u.op.GetBytesTotal() == 0 {
		return "the registry has not told the image's size by then"
	}
	return fmt.Sprintf("%s of %s are on the node", bytesText(u.op.GetBytesDone()), bytesText(u.op.GetBytesTotal()))
}

func (u *pull) fields() logrus.Fields {
	return logrus.Fields{"op": u.op.GetUid(), "image": u.req.GetImage(), "owner": u.req.GetOwner()}
}

// finishLocked ends the operation. The caller holds p.mu.
func (p *Puller) finishLocked(u *pull, phase opsv1.PullPhase, reason, message string) {
	message = u.endLocked(phase == opsv1.PullPhase_PULL_SUCCEEDED, message)
	u.op.Phase, u.op.Reason, u.op.Message, u.op.BytesPerSecond = phase, reason, message, 0
	u.op.RetryAfter, u.op.LastFailure = nil, nil
	u.op.FinishTime = timestamppb.Now()
	if phase == opsv1.PullPhase_PULL_SUCCEEDED {
		p.claims.end(u.op.GetUid())
	} else {
		p.claims.over(u.op.GetUid())
	}
	u.credentials = nil
	if err := p.saveLocked(u); err != nil {
		p.log.WithFields(u.fields()).WithError(err).Error("end of pull not written")
	}
	p.metrics.finished(u.op)
	p.traced(u.op, u.req.GetImage())
	p.log.WithFields(u.fields()).WithFields(logrus.Fields{"phase": phase, "reason": reason}).Info("pull finished")
	u.notifyLocked()
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
	return p.journal.putPull(u.op.GetUid(), &record{Request: req, Operation: op, Credentials: u.wants, Private: u.private, Had: u.had})
}

// submit accepts a pull, or returns the one there is.
func (p *Puller) submit(req *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	return p.take(req, false)
}

// take is submit. One that something waits for is urgent before anything of it begins: what it may do depends on that.
func (p *Puller) take(req *opsv1.PullRequest, urgent bool) (*opsv1.PullOperation, error) {
	named, err := normalize(req.GetImage())
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
			return nil, status.Errorf(codes.AlreadyExists, "pull %s exists with another request; choose a new UID", req.GetUid())
		}
		if urgent {
			p.hurryLocked(known)
		}
		if known.op.GetFinishTime() == nil && len(credentials) > 0 {
			if !sameCredentials(known.credentials, credentials) {
				known.credentials = credentials
				if known.given++; known.denied {
					known.retryAt = time.Time{} // what the registry said was to others
				}
			}
			if !known.wants {
				known.wants = true
				if err := p.saveLocked(known); err != nil {
					p.log.WithFields(known.fields()).WithError(err).Warn("that the pull has credentials is not written")
				}
			}
			p.nudge()
		}
		return proto.Clone(known.op).(*opsv1.PullOperation), nil
	}
	active := 0
	for _, u := range p.pulls {
		if u.op.GetFinishTime() == nil {
			active++
		}
	}
	if active >= maxActive {
		return nil, status.Errorf(codes.ResourceExhausted, "%d pulls are unfinished on this node, which is the most it takes; wait for some to finish", active)
	}
	u := &pull{
		req: req, named: named, key: keyOf(named, req), urgent: urgent, credentials: credentials, wants: len(credentials) > 0, changed: make(chan struct{}),
		op: &opsv1.PullOperation{
			Uid: req.GetUid(), Image: req.GetImage(), Resolved: named.String(), Owner: req.GetOwner(), Phase: opsv1.PullPhase_PULL_WAITING,
			Reason: opsv1.PullReasonInQueue, CreateTime: timestamppb.Now(),
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

// expireLocked forgets finished pulls that are too old or too many. The caller holds p.mu.
func (p *Puller) expireLocked(now time.Time) {
	var finished []*pull
	for _, u := range p.pulls {
		if u.op.GetFinishTime() != nil {
			finished = append(finished, u)
		}
	}
	slices.SortFunc(finished, func(a, b *pull) int { return a.op.GetFinishTime().AsTime().Compare(b.op.GetFinishTime().AsTime()) })
	for i, u := range finished {
		if now.Sub(u.op.GetFinishTime().AsTime()) <= keepFinished && len(finished)-i <= maxFinished {
			break
		}
		if err := p.journal.removePull(u.op.GetUid()); err != nil {
			p.log.WithError(err).Warn("finished pull not forgotten")
			return
		}
		delete(p.pulls, u.op.GetUid())
	}
}

// cancel ends a pull. reason is for people, code is for programs and may be empty.
func (p *Puller) cancel(uid, reason, code string) (*opsv1.PullOperation, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.pulls[uid]
	if u == nil {
		return nil, nil, noPull(uid)
	}
	if u.op.GetFinishTime() == nil {
		u.cancelled, u.cancelCode = reason, code
		if u.stop != nil {
			u.stop(errCancelled)
		} else {
			p.cancelLocked(u)
		}
	}
	return proto.Clone(u.op).(*opsv1.PullOperation), u.changed, nil
}

// cancelLocked ends a pull that somebody has cancelled. The caller holds p.mu.
func (p *Puller) cancelLocked(u *pull) {
	u.op.CancelCode = u.cancelCode
	p.finishLocked(u, opsv1.PullPhase_PULL_CANCELLED, opsv1.PullReasonCancelled, u.cancelled)
}

func (p *Puller) watch(uid string) (*opsv1.PullOperation, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.pulls[uid]
	if u == nil {
		return nil, nil, noPull(uid)
	}
	return proto.Clone(u.op).(*opsv1.PullOperation), u.changed, nil
}

func (p *Puller) list(activeOnly bool) []*opsv1.PullOperation {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*opsv1.PullOperation
	for _, u := range p.pulls {
		if activeOnly && u.op.GetFinishTime() != nil {
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
