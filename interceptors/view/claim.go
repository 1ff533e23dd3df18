// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"
)

// Yield says that kubelet, or whoever speaks CRI through the proxy, takes the slot back, and how.
type Yield struct {
	// Method is the CRI method that asked.
	Method string
	// Grace is how long the processes of the slot may take to stop, in seconds.
	Grace int64
}

// Claim is an operation's exclusive hold on a slot.
type Claim struct {
	slots *Slots
	slot  Slot

	yielded chan struct{}
	done    chan struct{}

	// The rest is guarded by slots.mu.
	yield     *Yield
	sandbox   string
	incumbent string
	token     string
	successor string
	active    bool // the view hides or masks for it
	released  bool
	driven    chan struct{} // closed once driver is set; nil if there will be none
	driver    Driver
}

// Slot returns the slot that is held.
func (c *Claim) Slot() Slot { return c.slot }

// Bind names the sandbox and the incumbent, so that kubelet's calls on them find the claim. It
// hides and masks nothing by itself.
func (c *Claim) Bind(sandbox, incumbent string) {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	c.sandbox, c.incumbent = sandbox, incumbent
}

// Successor returns the ID of the successor, or "" if there is none that is still hidden.
func (c *Claim) Successor() string {
	c.slots.mu.RLock()
	defer c.slots.mu.RUnlock()
	return c.successor
}

// cutTimeout is how long an operation waits for a call of an unknown method that is under way
// before it ends the call. A list takes milliseconds; what takes this long is a stream without an
// end, which its caller opens again.
const cutTimeout = 2 * time.Second

// Hide makes the claim active: from its return on, no answer shows a container that carries the
// token. It waits until answers that were already on their way undecoded have passed, at most until
// ctx ends. Then nothing is hidden, and the error names the calls that have not been answered and
// wraps ctx's.
func (c *Claim) Hide(ctx context.Context, token string) error {
	v := c.slots.visibility
	idle := v.hide(c, token)
	cut := time.NewTimer(cutTimeout)
	defer cut.Stop()
	for {
		select {
		case <-idle:
			return nil
		case <-cut.C:
			v.cutUnknown()
		case <-ctx.Done():
			names := v.passingNames()
			c.Discard()
			return fmt.Errorf("not answered yet: %s: %w", names, ctx.Err())
		}
	}
}

// HideNow is Hide for the time before the first call is served.
func (c *Claim) HideNow(token string) { c.slots.visibility.hide(c, token) }

// Staged names the container that carries the token, once it is known.
func (c *Claim) Staged(id string) { c.slots.visibility.staged(c, id) }

// Mask shows the incumbent running from now on. It does nothing once the claim is settled.
func (c *Claim) Mask() { c.slots.visibility.mask(c) }

// Reveal ends hiding and masking in one step: the next list shows both containers as they are, and
// from then on so does their status. The list of a relist of kubelet's that is under way is an
// exception, see [History.AckList]. Events that were held back are sent.
func (c *Claim) Reveal() { c.settle(true) }

// TryReveal is [Claim.Reveal], unless someone has taken the slot back: then it does nothing and
// returns false. Who takes it back later finds the slot revealed.
func (c *Claim) TryReveal() bool {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	if c.yield != nil {
		return false
	}
	c.settleLocked(true)
	return true
}

// Discard is Reveal for a successor that has been removed: events held back for it are dropped.
func (c *Claim) Discard() { c.settle(false) }

func (c *Claim) settle(show bool) {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	c.settleLocked(show)
}

func (c *Claim) settleLocked(show bool) {
	if !c.active {
		return
	}
	s := c.slots
	c.active = false
	s.active.Add(-1)
	delete(s.strays, c)
	masked := s.visibility.showLocked(c)
	revealed := c.successor
	if show && revealed != "" {
		s.history.replacedLocked(c.incumbent, successor{id: revealed, sandbox: c.sandbox, slot: c.slot}, masked)
	}
	c.token, c.successor = "", ""
	for b := range s.visibility.buffers {
		b.settleLocked(c, revealed, show)
	}
}

// Release gives the slot up and lets the next in line have it. Whatever is still hidden or masked
// is revealed. Releasing twice is fine.
func (c *Claim) Release() {
	s := c.slots
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.released {
		return
	}
	c.released = true
	c.settleLocked(true)
	close(c.done)
	delete(s.claims, c.slot)
	if q := s.waiters[c.slot]; len(q) > 0 {
		q[0] <- s.claimLocked(c.slot)
		s.waiters[c.slot] = q[1:]
	}
	if len(s.waiters[c.slot]) == 0 {
		delete(s.waiters, c.slot)
	}
}

// TakeBack asks the operation that holds the slot to get out of the way.
func (c *Claim) TakeBack(y Yield) {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	if c.yield == nil {
		c.yield = &y
		close(c.yielded)
	}
}

// Yielded is closed when someone takes the slot back; see [Claim.YieldedTo].
func (c *Claim) Yielded() <-chan struct{} { return c.yielded }

// YieldedTo returns who took the slot back; nil if nobody has.
func (c *Claim) YieldedTo() *Yield {
	c.slots.mu.RLock()
	defer c.slots.mu.RUnlock()
	return c.yield
}

// Wait waits until the claim is released or ctx ends.
func (c *Claim) Wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Stopping reports whether someone else is stopping the incumbent or its sandbox. It covers the
// stops that began before [Claim.Bind], and [Claim.Yielded] those that begin after it: together
// they leave no stop unnoticed.
func (c *Claim) Stopping() bool {
	h := c.slots.history
	h.mu.RLock()
	defer h.mu.RUnlock()
	return c.namedLocked(maps.Keys(h.stops)) || c.namedLocked(slices.Values(h.predecessorStops))
}

// namedLocked reports whether one of the IDs is the incumbent or its sandbox.
func (c *Claim) namedLocked(ids iter.Seq[string]) bool {
	for id := range ids {
		if id != "" && (strings.HasPrefix(c.incumbent, id) || strings.HasPrefix(c.sandbox, id)) {
			return true
		}
	}
	return false
}
