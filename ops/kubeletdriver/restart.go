// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubeletdriver

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// RestartOptions are what a [Restart] needs. All are required.
type RestartOptions struct {
	// Refusal says why a stop of kubelet's does not join the restart; empty if it does.
	Refusal func(ctx context.Context) string
	// Joined is called when a stop joins.
	Joined func()
	// Shorten stops the incumbent within a grace that is shorter than the one it is being stopped
	// within.
	Shorten func(ctx context.Context, grace time.Duration)
	Log     logrus.FieldLogger
}

// Restart passes on to a restart what kubelet does in its slot. Kubelet does not know that the
// container is being stopped: when a probe fails meanwhile, as that of an application that drains,
// kubelet stops the container too. It wants what the restart does already, so its stop joins: it is
// answered once the successor is there. The stop of a pod that goes away is told apart.
type Restart struct {
	driver
	o         RestartOptions
	shown     chan struct{} // closed when kubelet has been shown the successor
	shortened chan struct{} // closed when kubelet has had the incumbent stopped within less than its grace

	// driver.mu guards all following fields.
	stops       int  // stops of kubelet's of which it is not decided whether they join
	joined      bool // one has
	isShortened bool // shortened is closed
	left        bool // the restart goes on in another process
}

var _ view.Driver = (*Restart)(nil)

// NewRestart returns a driver that gives way to every stop until Listen.
func NewRestart(o RestartOptions) *Restart {
	return &Restart{
		driver: newDriver(o.Shorten), o: o, shown: make(chan struct{}), shortened: make(chan struct{}),
	}
}

// Listen lets kubelet's stops join from now on. by is when the incumbent's grace ends.
func (r *Restart) Listen(by time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listening, r.by = true, by
}

// SetJoined says that a stop has joined, in the process before this one.
func (r *Restart) SetJoined() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.joined = true
}

// Show says that kubelet has been shown the successor, and whether kubelet is stopping the
// incumbent, by a call that has perhaps not come here yet. It reports whether a stop has joined, or
// is about to. If none has, none will.
func (r *Restart) Show(stopping bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.shown)
	r.listening = r.joined || r.stops > 0 || stopping
	return r.listening
}

// IsShown reports whether kubelet has been shown the successor.
func (r *Restart) IsShown() bool {
	select {
	case <-r.shown:
		return true
	default:
		return false
	}
}

// Shortened returns a channel that is closed once kubelet has had the incumbent stopped within less
// than its grace.
func (r *Restart) Shortened() <-chan struct{} { return r.shortened }

// End says that the restart answers no more. left says that another process goes on with it.
func (r *Restart) End(left bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left = left
	close(r.over)
}

// Stop implements [view.Driver].
func (r *Restart) Stop(ctx context.Context, grace int64) (bool, error) {
	if !r.begin() {
		return false, nil
	}
	why := r.o.Refusal(ctx)
	r.decide(why == "")
	if why != "" {
		r.o.Log.WithField("reason", why).Info("kubelet stops the container, and the restart does not go on")
		return false, nil
	}
	r.o.Joined()
	r.hurry(ctx, time.Duration(grace)*time.Second)
	select {
	case <-r.shown:
		return true, nil
	case <-r.over:
	case <-ctx.Done(): // the restart goes on
		return true, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.IsShown():
		return true, nil
	case r.left:
		return true, status.Error(codes.Unavailable,
			"cri-proxy ends; its next process goes on with the restart of the container")
	default: // it has failed: kubelet's own stop does no harm
		return false, nil
	}
}

// begin reports whether stops may join.
func (r *Restart) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.listening {
		r.stops++
	}
	return r.listening
}

func (r *Restart) decide(joins bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stops--
	r.joined = r.joined || joins
}

func (r *Restart) hasJoined() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.joined
}

// hurry stops the incumbent within the grace if that ends before the one under way.
func (r *Restart) hurry(ctx context.Context, grace time.Duration) {
	r.mu.Lock()
	sooner := !r.IsShown() && r.isSoonerLocked(grace)
	r.mu.Unlock()
	if !sooner {
		return
	}
	r.shorten(ctx, grace)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isShortened {
		r.isShortened = true
		close(r.shortened)
	}
}

// Create implements [view.Driver]. Kubelet creates in the slot after its stop has joined.
// Whoever else does waits for the restart to end.
func (r *Restart) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	if !r.hasJoined() {
		return "", true
	}
	return r.create(ctx, req)
}
