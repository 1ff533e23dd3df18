// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Slot is the place of one container in a pod: its successive attempts share it.
type Slot struct {
	PodUID    string
	Container string
}

// String returns the slot as podUID/container.
func (s Slot) String() string { return s.PodUID + "/" + s.Container }

// Slots says which operation holds which slot.
type Slots struct {
	*shared
	visibility *Visibility
	history    *History

	// All following fields are guarded by mu.

	claims map[Slot]*Claim
	// taken counts the claims that there have been.
	taken uint64
	// waiters are those who wait for a slot, in the order in which they came. Who releases the slot
	// sends the next one its claim.
	waiters map[Slot][]chan *Claim
	// strays are the claims that hold no slot; see [Slots.Stray].
	strays map[*Claim]struct{}
	// awaited has what waits for the next container of a slot; see [Slots.WhenCreated].
	awaited map[Slot]awaited
}

// ErrClaimed is returned by TryClaim when the slot is taken.
var ErrClaimed = errors.New("another operation holds the slot")

// Claim waits, first come first served, until no one holds the slot and takes it. It returns ctx's
// error if that ends first.
func (s *Slots) Claim(ctx context.Context, slot Slot) (*Claim, error) {
	s.mu.Lock()
	if s.claims[slot] == nil && len(s.waiters[slot]) == 0 {
		c := s.claimLocked(slot)
		s.mu.Unlock()
		return c, nil
	}
	waiter := make(chan *Claim, 1) // the releaser makes the claim on our behalf
	s.waiters[slot] = append(s.waiters[slot], waiter)
	s.mu.Unlock()

	select {
	case c := <-waiter:
		return c, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	q := s.waiters[slot]
	i := slices.Index(q, waiter)
	if i >= 0 {
		s.waiters[slot] = slices.Delete(q, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 { // the claim came at the same moment
		(<-waiter).Release()
	}
	return nil, ctx.Err()
}

// TryClaim takes the slot or returns [ErrClaimed] at once.
func (s *Slots) TryClaim(slot Slot) (*Claim, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claims[slot] != nil || len(s.waiters[slot]) > 0 {
		return nil, ErrClaimed
	}
	return s.claimLocked(slot), nil
}

// claimLocked gives the slot to a new claim.
func (s *Slots) claimLocked(slot Slot) *Claim {
	c := s.newClaim(slot)
	s.claims[slot] = c
	s.taken++
	return c
}

func (s *Slots) newClaim(slot Slot) *Claim {
	return &Claim{slots: s, slot: slot, yielded: make(chan struct{}), done: make(chan struct{})}
}

// Stray hides a container whose operation is lost until the claim that it returns is settled. That
// claim holds no slot. incumbent is the container beside which the stray runs, or "". It is shown
// running for as long, because the stray takes its place should it end.
func (s *Slots) Stray(slot Slot, sandbox, token, id, incumbent string) *Claim {
	c := s.newClaim(slot)
	c.sandbox, c.incumbent = sandbox, incumbent
	s.mu.Lock()
	s.strays[c] = struct{}{}
	s.mu.Unlock()
	c.HideNow(token)
	c.Staged(id)
	if incumbent != "" {
		c.Mask()
	}
	return c
}

// Claimed reports whether someone holds the slot.
func (s *Slots) Claimed(slot Slot) bool { return s.Holder(slot) != nil }

// Taken returns how often a slot has been taken. Who asks before and after looking at the runtime
// knows whether an operation may have made containers in between.
func (s *Slots) Taken() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.taken
}

// Holder returns the claim that holds the slot, or nil.
func (s *Slots) Holder(slot Slot) *Claim {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.claims[slot]
}

// ByContainer finds the claim whose incumbent or successor the ID names, and returns the full ID.
// The ID may be a unique prefix, as containerd accepts them. A stray's claim is found by the stray
// only: the container beside it is that of whoever holds the slot.
func (s *Slots) ByContainer(id string) (*Claim, string) {
	if id == "" {
		return nil, ""
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var found *Claim
	full := ""
	is := func(c *Claim, known string) bool {
		if known != "" && strings.HasPrefix(known, id) {
			found, full = c, known
		}
		return known == id
	}
	for c := range s.strays {
		if is(c, c.successor) {
			return c, id
		}
	}
	for _, c := range s.claims {
		if is(c, c.incumbent) || is(c, c.successor) {
			return c, id
		}
	}
	return found, full
}

// BySandbox returns the claims on slots of the sandbox.
func (s *Slots) BySandbox(id string) []*Claim {
	if id == "" {
		return nil
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []*Claim
	for _, c := range s.claims {
		if c.sandbox != "" && strings.HasPrefix(c.sandbox, id) {
			out = append(out, c)
		}
	}
	return out
}

// Entangled returns the slots in which a call of kubelet's and an operation meet at this moment:
// neither of the two can be left to another process.
func (s *Slots) Entangled() []Slot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var slots []Slot
	for slot, c := range s.claims {
		if c.yield != nil || c.namedLocked(maps.Keys(s.history.stops)) {
			slots = append(slots, slot)
		}
	}
	slices.SortFunc(slots, func(a, b Slot) int { return strings.Compare(a.String(), b.String()) })
	return slots
}

// awaited is what waits for a container.
type awaited struct {
	until time.Time
	is    func(id string, req *runtimeapi.CreateContainerRequest) bool
}

// WhenCreated calls is with every container that is made in the slot, until is returns true, or
// until the given time.
func (s *Slots) WhenCreated(
	slot Slot, until time.Time, is func(id string, req *runtimeapi.CreateContainerRequest) bool,
) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.awaited, func(_ Slot, a awaited) bool { return time.Now().After(a.until) })
	s.awaited[slot] = awaited{until: until, is: is}
}

// Created says that a container has been made in the slot; see [Slots.WhenCreated].
func (s *Slots) Created(slot Slot, id string, req *runtimeapi.CreateContainerRequest) {
	s.mu.Lock()
	a, ok := s.awaited[slot]
	s.mu.Unlock()
	if !ok || time.Now().Before(a.until) && !a.is(id, req) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.awaited[slot].until.Equal(a.until) { // still the same
		delete(s.awaited, slot)
	}
}
