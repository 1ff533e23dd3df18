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

	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

// urgentParallel is how many pulls that something on the node waits for run beside the others: they
// must not stand behind a pull that takes its time because nobody waits for it.
const urgentParallel = 2

// round is one look for pulls that may begin an attempt. Its caller holds Puller.mu.
type round struct {
	p   *Puller
	now time.Time
	// next is when there may be more to do, counted from now.
	next time.Duration
	// running and urgent are how many attempts run, in the places for all pulls and in those for
	// urgent ones.
	running, urgent int
	// busy has the UID of the pull that runs, by key.
	busy map[string]string
	// backOff is until when other pulls with the same key wait as well, and tooMany until when even
	// those wait that are urgent.
	backOff, tooMany map[string]time.Time
	waiting          []*pull
}

// startSome starts what may start and returns when there may be more.
func (p *Puller) startSome(ctx context.Context, wg *sync.WaitGroup) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &round{
		p: p, now: time.Now(), next: time.Hour, busy: map[string]string{},
		backOff: map[string]time.Time{}, tooMany: map[string]time.Time{},
	}
	for _, u := range p.pulls {
		if !u.finished() {
			r.add(u)
		}
	}
	slices.SortFunc(r.waiting, func(a, b *pull) int {
		if a.urgent != b.urgent {
			return map[bool]int{true: -1, false: 1}[a.urgent]
		}
		return a.op.GetCreateTime().AsTime().Compare(b.op.GetCreateTime().AsTime())
	})
	for _, u := range r.waiting {
		if r.decide(u) {
			r.busy[u.key] = u.op.GetUid()
			p.startLocked(ctx, wg, u)
		}
	}
	return max(r.next, 10*time.Millisecond)
}

// add counts a pull that has not finished.
func (r *round) add(u *pull) {
	if u.stop != nil {
		if u.apart {
			r.urgent++
		} else {
			r.running++
		}
		r.busy[u.key] = u.op.GetUid()
		return
	}
	r.waiting = append(r.waiting, u)
	// A registry that asks to slow down means everybody. A registry may have been out of reach for
	// one pull alone, with its limit or its time: one attempt more does not hurt where somebody
	// waits. What else went wrong was that pull's own.
	switch u.failed {
	case opsv1.PullReasonTooManyRequests:
		r.tooMany[u.key] = later(r.tooMany[u.key], u.retryAt)
		r.backOff[u.key] = later(r.backOff[u.key], u.retryAt)
	case opsv1.PullReasonRegistryUnavailable, opsv1.PullReasonTimeout:
		r.backOff[u.key] = later(r.backOff[u.key], u.retryAt)
	}
}

// decide reports whether the pull begins an attempt now. Otherwise it ends the pull, or says why
// the pull waits.
func (r *round) decide(u *pull) bool {
	p := r.p
	if by, ok := u.deadline(); ok {
		if !r.now.Before(by) {
			p.failLocked(u, opsv1.PullReasonDeadlineExceeded, "not pulled within its deadline: %s", u.op.GetMessage())
			return false
		}
		r.lookAgain(by)
	}
	if u.op.GetAttempt() >= u.attempts() { // of an earlier process
		p.failLocked(u, opsv1.PullReasonInternalError, "cri-proxy has ended in the middle of attempt %d of %d: "+
			"if nobody has killed it, the journal of its unit says why", u.op.GetAttempt(), u.attempts())
		return false
	}
	if u.wants && u.credentials == nil {
		if by := p.opened.Add(credentialsTimeout); r.now.Before(by) {
			r.lookAgain(by)
		} else {
			p.failLocked(u, opsv1.PullReasonCredentialsNeeded, "cri-proxy was restarted, "+
				"and nobody has repeated the command with its credentials for %s", credentialsTimeout)
		}
		return false
	}
	others := r.backOff[u.key]
	if u.urgent {
		others = r.tooMany[u.key]
	}
	pause := p.yielder.pauseLocked(u)
	switch leader := r.busy[u.key]; {
	case r.now.Before(others), r.now.Before(u.retryAt):
		r.lookAgain(later(others, u.retryAt))
		if !r.now.Before(u.retryAt) {
			u.op.LastFailure = nil
			u.waitLocked(opsv1.PullReasonBackOff, "another pull of the image has just failed")
		}
	case leader != "":
		if u.urgent {
			p.overtakeLocked(u, p.pulls[leader])
		}
		u.followLocked(p.pulls[leader].op)
		r.next = min(r.next, progressInterval)
	case pause != "":
		u.waitLocked(opsv1.PullReasonYieldsToKubelet, pause)
	case u.urgent && r.urgent < urgentParallel:
		r.urgent++
		u.apart = true
		return true
	case r.running >= p.parallel && u.urgent:
		u.waitLocked(opsv1.PullReasonInQueue, fmt.Sprintf(
			"%d pulls that something waits for and %d of %d others at once are under way", r.urgent, r.running,
			p.parallel))
	case r.running >= p.parallel:
		u.waitLocked(opsv1.PullReasonInQueue,
			fmt.Sprintf("%d of %d pulls at once are under way", r.running, p.parallel))
	default: // an urgent one too, when there are more of these than places for them
		r.running++
		return true
	}
	return false
}

// lookAgain has the next round begin at t, if not before.
func (r *round) lookAgain(t time.Time) { r.next = min(r.next, t.Sub(r.now)) }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// overtakeLocked deals with a pull of the same image that runs when an urgent pull is to begin.
// That one gives way to nothing: see aheadLocked. If a speed limit of its own holds it back, and it
// has bytes to fetch, it is ended and the urgent one goes on from there.
func (p *Puller) overtakeLocked(urgent, running *pull) {
	limit, own := running.limit(p.limit), urgent.limit(p.limit)
	if limit > 0 && (own == 0 || own > limit) && !running.complete() && !running.urgent {
		running.stop(errOvertaken)
	}
}

// startLocked begins an attempt.
func (p *Puller) startLocked(ctx context.Context, wg *sync.WaitGroup, u *pull) {
	attemptCtx, stop := context.WithCancelCause(ctx)
	u.stop, u.cut = stop, false
	u.op.Attempt++
	if u.op.StartTime == nil {
		u.op.StartTime = timestamppb.Now()
	}
	u.op.Phase, u.op.Reason, u.op.Message = opsv1.PullPhase_PULL_RESOLVING, "", ""
	u.op.RetryAfter, u.op.LimitNotKept = nil, ""
	p.keepLocked(u) // an attempt that this process does not survive counts
	u.notifyLocked()
	p.yielder.kubelet.Wake() // kubelet may have been pulling for a while
	timeout, credentials, given := u.timeout(), u.credentials, u.given
	by, bound := u.deadline()
	wg.Go(func() {
		defer stop(nil)
		limited, cancel := context.WithTimeoutCause(attemptCtx, timeout, errTimeout)
		defer cancel()
		if bound {
			limited, cancel = context.WithDeadlineCause(limited, by, errDeadline)
			defer cancel()
		}
		log := p.log.WithFields(u.fields())
		a := &attempt{Puller: p, u: u, log: log}
		err := guard.Try(log, func() error { return a.run(limited, credentials) })
		if !guard.Do(log, func() { p.settle(ctx, u, given, err, context.Cause(limited)) }) {
			guard.Do(log, func() { p.giveUp(u) })
		}
		p.nudge()
	})
}

// giveUp ends a pull after a panic in settle.
func (p *Puller) giveUp(u *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u.stop, u.apart = nil, false
	if !u.finished() {
		p.failLocked(u, opsv1.PullReasonInternalError,
			"cri-proxy met a bug of its own; its log says where, please report it")
	}
}

// settle decides what follows an attempt. given is how many sets of credentials had come when the
// attempt began, and cause what ended it early.
func (p *Puller) settle(ctx context.Context, u *pull, given int, err, cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u.stop, u.apart, u.failed, u.denied = nil, false, "", false
	u.limiter.Store(nil)
	u.slots.Store(false)
	if err == nil {
		return // the attempt has ended the pull
	}
	host, _ := registry.HostOf(u.named)
	f := registry.Explain(err, host)
	switch {
	case u.cancelled != "": // whatever else has ended the attempt
		p.cancelLocked(u)
		return
	case errors.Is(cause, errYield), errors.Is(cause, errOvertaken):
		p.yieldedLocked(u)
		return
	case errors.Is(cause, errDeadline):
		p.failLocked(u, opsv1.PullReasonDeadlineExceeded, "not pulled within its deadline; %s", u.soFar())
		return
	case ctx.Err() != nil: // shutting down
		u.op.Attempt--
		p.keepLocked(u)
		return
	case errors.Is(cause, errTimeout):
		f = &registry.Failure{Reason: opsv1.PullReasonTimeout, Message: fmt.Sprintf("an attempt may take %s, and %s; "+
			"give it longer for a large image or a slow network (timeoutSeconds of a job)", u.timeout(), u.soFar())}
	}
	p.log.WithFields(u.fields()).WithField("reason", f.Reason).WithField("attempt", u.op.GetAttempt()).Warn(f.Message)
	if f.Credentials && given != u.given { // others have come since
		u.op.Attempt--
		p.keepLocked(u)
		u.backOffLocked(f, 0)
		return
	}
	if f.Final || f.Credentials && u.urgent || u.op.GetAttempt() >= u.attempts() {
		message := f.Message
		if n := u.op.GetAttempt(); n > 1 {
			message = fmt.Sprintf("%s; %d attempts", message, n)
		}
		p.finishLocked(u, opsv1.PullPhase_PULL_FAILED, f.Reason, message)
		return
	}
	wait := opsv1.PullBackOff(u.op.GetAttempt())
	u.retryAt, u.failed, u.denied = time.Now().Add(wait), f.Reason, f.Credentials
	u.backOffLocked(f, wait)
}

// yieldedLocked puts a pull that was cut off back into the queue.
func (p *Puller) yieldedLocked(u *pull) {
	u.op.Attempt--
	p.keepLocked(u)
	if why := p.yielder.pauseLocked(u); why != "" {
		u.waitLocked(opsv1.PullReasonYieldsToKubelet, why)
		return
	}
	u.op.Phase, u.op.Reason, u.op.BytesPerSecond = opsv1.PullPhase_PULL_WAITING, opsv1.PullReasonInQueue, 0
	u.notifyLocked()
}
