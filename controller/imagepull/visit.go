// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// slotPatience is how long a node that has become silent keeps its turn.
	slotPatience = 30 * time.Second
	// answerPatience bounds the wait for the first answer of a stream, watchRenew that for news on it. A stream without
	// news is begun anew: that notices a node which has vanished without a word.
	answerPatience = 5 * time.Second
	watchRenew     = 20 * time.Second
	// tellPause is how soon a node is told again.
	tellPause, tellPauseMax = time.Second, 5 * time.Second
	// conflicts is how many UIDs are passed over that the node has for something else.
	conflicts = 5

	// secretsFor is how long secrets are used that were read; secretsPatience bounds the reading.
	secretsFor      = 30 * time.Second
	secretsPatience = 10 * time.Second

	// dismissPatience is how long nodes that do not answer are told to leave a job alone.
	dismissPatience = 30 * time.Second
)

// pull gives a node its turn. The caller holds the mutex.
func (u *run) pull(m *member, now time.Time) {
	m.begun, m.op = now, nil
	u.setPhase(m, active)
	if !m.busy() { // else kick does it
		u.visit(m)
	}
}

// visit tells a node to pull and follows it until the pull has ended or the node has been silent for too long. The
// caller holds the mutex.
func (u *run) visit(m *member) {
	w, node, round := u.wish, m.target.node, m.round
	u.talk(m, func(ctx context.Context, epoch int) {
		u.metrics.pulling(1)
		defer u.metrics.pulling(-1)
		taken := false // the node has the command
		var silent time.Time
		left, over := newAllowance(w.request, time.Now()), ""
		var renew renewal
		secretsOf := secretsFor
		for tries := 0; ; tries++ {
			op, err := u.tell(ctx, w, node, round, secretsOf)
			secretsOf = secretsFor
			if err == nil && op.GetFinishTime() == nil {
				taken = true
				u.progress(m, epoch, op)
				op, err = u.watch(ctx, node, op.GetUid(), &renew, func(op *opsv1.PullOperation) bool {
					silent, tries = time.Time{}, 0
					u.progress(m, epoch, op)
					over = left.spend(op, time.Now())
					return over == ""
				})
			}
			if ctx.Err() != nil {
				return
			}
			now := time.Now()
			if err == nil && op.GetFinishTime() != nil {
				u.change(m, epoch, func() { u.settle(m, op, now) })
				return
			}
			if err == nil && over != "" {
				u.overdue(ctx, m, epoch, node, op, over)
				return
			}
			if err == nil && renew.due(now) {
				secretsOf = secretsAgain
				continue
			}
			if err != nil && notFound(err) {
				err = nil // a new journal: tell it again
			}
			if err != nil {
				if silent.IsZero() {
					silent = now
				}
				if t := troubleOf(err); !taken || t.final || now.Sub(silent) >= slotPatience {
					u.change(m, epoch, func() { u.giveWay(m, err, t, silent) })
					return
				}
			}
			if !pause(ctx, min(tellPause<<min(tries, 3), tellPauseMax)) {
				return
			}
		}
	})
}

// giveWay takes a node's turn from it because it could not be told to pull, or has become silent.
func (u *run) giveWay(m *member, err error, t trouble, since time.Time) {
	var nodeError *nodes.Error
	conflict := errors.As(err, &nodeError) && nodeError.Code() == codes.AlreadyExists
	held := m.held
	m.held = false
	switch {
	case conflict && m.retries < conflicts:
		m.round++
		m.retries++
		u.setPhase(m, pending)
	case t.final && t.reason == reasonInvalidRequest:
		u.present(m)
		u.fail(m, t.reason, t.message)
		m.retryAt = time.Now().Add(retryMax)
		u.metrics.failed(t.reason)
	case held:
		// It had the image when it was last heard of.
		u.setPhase(m, succeeded)
		m.retryAt = time.Now().Add(retryMin)
	default:
		if m.untaken = true; m.since.IsZero() {
			m.since = since
		}
		u.setPhase(m, unknown)
		u.troubled(m, t, time.Now())
	}
}

// change runs f with the mutex if the node has not been begun with anew, and wakes the reconciler if that is worth it.
func (u *run) change(m *member, epoch int, f func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if m.epoch != epoch || u.closed {
		return
	}
	f()
	u.news()
}

// progress notes what a pull says of itself.
func (u *run) progress(m *member, epoch int, op *opsv1.PullOperation) {
	u.change(m, epoch, func() {
		u.present(m)
		op.Layers = nil // many, and never looked at
		if op.GetPhase() != m.op.GetPhase() || op.GetReason() != m.op.GetReason() {
			u.pace.moved(0)
		}
		m.op = op
		u.triesAgain(m, op)
		if total := op.GetBytesTotal(); total > 0 {
			// Never the whole: it is unpacked and named last.
			u.setFraction(m, max(m.fraction, min(float64(op.GetBytesDone())/float64(total), 0.99)))
		}
	})
}

// tell gives a node the command, with credentials that were read no longer ago than that.
func (u *run) tell(ctx context.Context, w *wish, node nodes.Node, round int, ago time.Duration) (*opsv1.PullOperation, error) {
	keys, err := u.keyring(ctx, w, ago)
	if err != nil {
		return nil, err
	}
	return u.nodes.Pull(ctx, node, w.pullRequest(round, keys.For(w.request.GetImage())))
}

// watch follows a pull and returns the last that it said: once that has ended, when it needs credentials, when each has
// enough, when the renewal is due, or when there has been no news for a while.
func (u *run) watch(ctx context.Context, node nodes.Node, uid string, renew *renewal, each func(*opsv1.PullOperation) bool) (*opsv1.PullOperation, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	patience := time.AfterFunc(answerPatience, cancel)
	defer patience.Stop()
	var last *opsv1.PullOperation
	err := u.nodes.WatchPull(watching, node, uid, func(op *opsv1.PullOperation) bool {
		patience.Reset(sooner(watchRenew, renew.note(op, time.Now())))
		last = op
		return each(op) && op.GetFinishTime() == nil && op.GetReason() != reasonCredentials
	})
	if watching.Err() != nil && ctx.Err() == nil && last.GetFinishTime() == nil {
		if last != nil {
			return last, nil
		}
		return nil, &nodes.Error{Node: node, Method: "WatchPull", Err: status.Error(codes.DeadlineExceeded, "no answer"), Silent: true}
	}
	return last, err
}

// reasonCredentials is the node's word for a pull that has outlived the process which had its credentials.
const reasonCredentials = "CredentialsNeeded"

// pause waits and says whether to go on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// keyring reads the job's secrets, if that was not done no longer ago than that.
func (u *run) keyring(ctx context.Context, w *wish, ago time.Duration) (*pullsecrets.Keyring, error) {
	u.keysMu.Lock()
	defer u.keysMu.Unlock()
	u.mu.Lock()
	keys, at := u.keys, u.keysAt
	u.mu.Unlock()
	if keys != nil && time.Since(at) < ago {
		return keys, nil
	}
	ctx, cancel := context.WithTimeout(ctx, secretsPatience)
	defer cancel()
	read, err := pullsecrets.Read(ctx, u.secrets, w.job.Namespace, pullsecrets.DefaultAccount, w.secrets, "pullSecrets")
	if err != nil {
		if keys != nil {
			return keys, nil // those of before are as good as any
		}
		return nil, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if keys == nil && read.Asked || len(read.Wrong) > 0 != (keys != nil && len(keys.Wrong) > 0) {
		u.pace.urgent = true
		u.pace.moved(0)
	}
	u.keys, u.keysAt = read, time.Now()
	return read, nil
}

// leaving is a node that is told to leave a job alone.
type leaving struct {
	node nodes.Node
	// quiet is closed when nothing is said to it any more; nil means now.
	quiet <-chan struct{}
}

// dismiss cancels the job's pulls on the nodes and, with release, ends its pins. It goes on until all have answered or
// dismissPatience is over, and then calls done with the number that have not. The caller holds the mutex.
func (u *run) dismiss(members []*member, release bool, why string, done func(left int)) {
	if len(members) == 0 {
		return
	}
	var left []leaving
	for _, m := range members {
		left = append(left, leaving{m.target.node, m.ended})
	}
	w := u.wish
	u.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, dismissPatience)
		defer cancel()
		for wait := tellPause; ; wait = min(2*wait, tellPauseMax) {
			left = u.dismissOnce(ctx, w, left, release, why)
			if len(left) == 0 || !pause(ctx, wait) {
				break
			}
		}
		if len(left) > 0 {
			u.log.WithField("nodes", len(left)).Warn("nodes could not be told to leave the job alone: what they pull goes on, and what they pin expires")
		}
		done(len(left))
	})
}

// dismissOnce tries each node once and returns those that are left.
func (u *run) dismissOnce(ctx context.Context, w *wish, nodes []leaving, release bool, why string) []leaving {
	var mu sync.Mutex
	var left []leaving
	var g errgroup.Group
	g.SetLimit(surveyWidth)
	for _, n := range nodes {
		g.Go(func() error {
			if err := u.dismissNode(ctx, w, n, release, why); err != nil && !troubleOf(err).final {
				mu.Lock()
				defer mu.Unlock()
				left = append(left, n)
			}
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return left
}

func (u *run) dismissNode(ctx context.Context, w *wish, n leaving, release bool, why string) error {
	if n.quiet != nil {
		select {
		case <-n.quiet:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ops, err := u.nodes.ListPulls(ctx, n.node)
	if err != nil {
		return err
	}
	for _, op := range ops {
		if _, _, _, ours := w.parse(op.GetUid()); !ours || op.GetFinishTime() != nil {
			continue
		}
		if _, err := u.nodes.CancelPull(ctx, n.node, op.GetUid(), cancelReason+why); err != nil && !notFound(err) {
			return err
		}
	}
	if release {
		_, err = u.nodes.ReleasePins(ctx, n.node, w.request.GetOwner(), "")
	}
	return err
}
