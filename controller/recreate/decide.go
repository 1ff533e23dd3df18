// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"slices"
	"time"

	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// plan is what to do next for a request.
type plan struct {
	// command are the containers to start an operation for.
	command []*container
	// cancel are the containers whose operation to take back if it still can be.
	cancel []*container
	// drain says that the pod has to go out of service before anything else.
	drain bool
	// wait is how long until the passing of time alone changes the plan; 0 means never.
	wait time.Duration
}

// decide says what to do next, given containers whose state is up to date. It fails the containers
// that an earlier failure leaves out. Containers that are not parallel stop one after another, as
// under OpenKruise's daemon, which kills one in each pass and waits for its end
// (pkg/daemon/containerrecreate). unready is when the pod went out of service for the request; zero
// means it has not. gated says whether the pod can go out of service.
func decide(containers []*container, gated bool, unready, now time.Time) plan {
	var p plan
	var broken *container
	for _, c := range containers {
		if c.ended && !c.strategy.Ordered {
			continue // OpenKruise takes the container for stopped, and goes on with the next
		}
		if c.state.Phase == failed && !c.strategy.IgnoreFailure {
			broken = c
			break
		}
	}
	stopping := slices.ContainsFunc(containers, func(c *container) bool {
		return !c.done() && c.op != nil && !c.stopped()
	})
	ready := true // all before are done
	for _, c := range containers {
		before := ready
		if c.done() {
			continue
		}
		ready = false
		if c.op != nil {
			if broken != nil && c.state.Phase == pending {
				p.cancel = append(p.cancel, c)
			}
			continue
		}
		if broken != nil && c.state.Phase != recreating {
			c.fail("left alone: container %s failed and failurePolicy is Fail", broken.name)
			continue
		}
		if gated && c.strategy.Unready != nil {
			if unready.IsZero() {
				p.drain = true
				continue
			}
			if left := unready.Add(*c.strategy.Unready).Sub(now); left > 0 {
				p.wait = retry.Sooner(p.wait, left)
				continue
			}
		}
		if c.strategy.Ordered && !before || stopping && !c.strategy.Parallel {
			continue
		}
		p.command = append(p.command, c)
		stopping = true
	}
	return p
}
