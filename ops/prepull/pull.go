// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
	"github.com/cri-proxy/cri-proxy/ops/prepull/yield"
)

// pull is one operation. [Puller.mu] guards its fields, except req, named and key, which do not
// change, and limiter and slots.
type pull struct {
	req   *opsv1.PullRequest // without credentials
	named reference.Named
	key   string // pulls with the same key fetch the same

	op          *opsv1.PullOperation
	credentials []*opsv1.RegistryCredential
	// wants is set when the operation came with credentials, which an earlier process had.
	wants bool
	// private is set when credentials have been used, and had is the ID of the image that had the
	// name before that.
	private bool
	had     string
	// given counts the sets of credentials that have come.
	given int
	// retryAt is when the next attempt may begin, and failed the reason for that wait. denied is
	// set if the registry refused the credentials.
	retryAt time.Time
	failed  string
	denied  bool
	// urgent is set when something on the node waits for this very operation. Whoever waits decides
	// whether to ask again. apart is set when the pull runs in a place that is for urgent ones
	// only.
	urgent, apart bool
	// cut is set when the attempt that runs was cut off for kubelet.
	cut bool
	// layers is how the pull gives way to a pull of kubelet's that wants layers of it.
	layers yield.Layers
	// limiter slows down the attempt that runs; nil: nothing does. slots is set while the runtime
	// fetches for the attempt.
	limiter atomic.Pointer[rate.Limiter]
	slots   atomic.Bool
	stop    context.CancelCauseFunc // ends the attempt that runs; nil if none does
	// cancelled is why somebody has cancelled the pull, and cancelCode the code of that; both are
	// empty before.
	cancelled, cancelCode string
	changed               chan struct{} // closed and replaced at each change

	// unlimited says that the speed limit is not kept, and why. unlimitedFrom is BytesFetched when
	// that began.
	unlimited     string
	unlimitedFrom int64
}

// Why an attempt is ended.
var (
	errYield     = errors.New("kubelet pulls")
	errOvertaken = errors.New("a pull that something waits for takes over")
	errCancelled = errors.New("cancelled")
	errTimeout   = errors.New("the attempt took too long")
	errDeadline  = errors.New("the deadline has passed")
)

func keyOf(named reference.Named, req *opsv1.PullRequest) string {
	return named.String() + "|" + req.GetRuntimeHandler()
}

func (u *pull) fields() logrus.Fields {
	return logrus.Fields{"op": u.op.GetUid(), "image": u.req.GetImage(), "owner": u.req.GetOwner()}
}

// lease is the ID of the lease that keeps what the pull has fetched.
func (u *pull) lease() string { return imagestore.LeaseID(u.key) }

func (u *pull) finished() bool { return u.op.GetFinishTime() != nil }

func (u *pull) deadline() (time.Time, bool) {
	if d := u.req.GetDeadline().AsDuration(); d > 0 {
		return u.op.GetCreateTime().AsTime().Add(d), true
	}
	return time.Time{}, false
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

// limit returns the bound of the pull's speed in bytes a second; 0: none.
func (u *pull) limit(byDefault int64) int64 {
	if limit := u.req.GetBytesPerSecond(); limit != 0 {
		return limit
	}
	return byDefault
}

// complete reports whether all bytes are there.
func (u *pull) complete() bool {
	return u.op.GetBytesTotal() > 0 && u.op.GetBytesDone() == u.op.GetBytesTotal()
}

// soFar says how far the pull is.
func (u *pull) soFar() string {
	if u.op.GetBytesTotal() == 0 {
		return "the registry has not told the image's size by then"
	}
	return fmt.Sprintf("%s of %s are on the node", imagefs.Bytes(u.op.GetBytesDone()),
		imagefs.Bytes(u.op.GetBytesTotal()))
}

func (u *pull) notifyLocked() {
	close(u.changed)
	u.changed = make(chan struct{})
}

// waitLocked says why the pull waits.
func (u *pull) waitLocked(reason, message string) {
	if u.op.GetPhase() == opsv1.PullPhase_PULL_WAITING && u.op.GetReason() == reason && u.op.GetMessage() == message {
		return
	}
	u.op.Phase, u.op.Reason, u.op.Message = opsv1.PullPhase_PULL_WAITING, reason, message
	u.op.BytesPerSecond, u.op.RetryAfter, u.op.LimitNotKept = 0, nil, ""
	u.notifyLocked()
}

// backOffLocked says why the last attempt failed, and that the next one begins after wait; 0: at
// once.
func (u *pull) backOffLocked(f *registry.Failure, wait time.Duration) {
	when := "at once, with other credentials"
	if wait > 0 {
		when = fmt.Sprintf("in %s", wait)
	}
	u.op.LastFailure = &opsv1.AttemptFailure{Reason: f.Reason, Message: f.Message}
	u.waitLocked(opsv1.PullReasonBackOff,
		fmt.Sprintf("attempt %d of %d %s: %s: %s", u.op.GetAttempt()+1, u.attempts(), when, f.Reason, f.Message))
	if wait > 0 {
		u.op.RetryAfter = durationpb.New(wait)
	}
}

// followLocked shows the progress of another pull of the same image.
func (u *pull) followLocked(leader *opsv1.PullOperation) {
	u.op.Phase, u.op.Reason = leader.GetPhase(), ""
	u.op.Message = "another pull of the image is under way: " + leader.GetUid()
	u.op.BytesDone, u.op.BytesTotal = leader.GetBytesDone(), leader.GetBytesTotal()
	u.op.BytesPerSecond, u.op.Layers = leader.GetBytesPerSecond(), leader.GetLayers()
	u.op.RetryAfter, u.op.LimitNotKept = nil, ""
	if u.op.GetPhase() == opsv1.PullPhase_PULL_FETCHING || u.op.GetPhase() == opsv1.PullPhase_PULL_UNPACKING {
		u.op.LastFailure = nil
	}
	u.notifyLocked()
}

// unlimitedLocked says that the pull does not keep its speed limit, and why.
func (u *pull) unlimitedLocked(limit int64, why string) {
	u.unlimited = fmt.Sprintf("without the speed limit of %s/s: %s", imagefs.Bytes(limit), why)
	u.unlimitedFrom = u.op.GetBytesFetched()
	if !u.finished() {
		u.op.Message, u.op.LimitNotKept = "pulling "+u.unlimited, u.unlimited
		u.notifyLocked()
	}
}

// limitAgainLocked takes that back if nothing has come meanwhile: the next try may keep the limit.
func (u *pull) limitAgainLocked() {
	if u.unlimited != "" && u.op.GetBytesFetched() == u.unlimitedFrom {
		u.unlimited, u.op.Message, u.op.LimitNotKept = "", "", ""
	}
}

// endLocked adds to the message of a pull that ends that its speed limit was not kept.
func (u *pull) endLocked(succeeded bool, message string) string {
	if u.unlimited == "" || !succeeded && u.op.GetBytesFetched() == u.unlimitedFrom {
		u.op.LimitNotKept = ""
		return message
	}
	u.op.LimitNotKept = u.unlimited
	switch {
	case !succeeded:
		return message + "; tried " + u.unlimited
	case message == "":
		return "pulled " + u.unlimited
	default:
		return message + "; pulled " + u.unlimited
	}
}
