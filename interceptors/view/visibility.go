// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"sync/atomic"
)

// Verdict is how one container is shown.
type Verdict int

const (
	// Shown is a container that is shown as the runtime has it.
	Shown Verdict = iota
	// Hidden is a container that is not shown.
	Hidden
	// Masked is a container that is shown running whatever its state is.
	Masked
)

// Visibility says which containers are hidden and which are masked, and knows the calls whose
// answers depend on it.
type Visibility struct {
	*shared
	history *History
	starts  *Starts

	// guard says what a token means that the view does not hold; see [Visibility.Guard].
	guard atomic.Int32

	// All following fields are guarded by mu.

	// known are the tokens that say nothing new, while there is a guard.
	known  map[string]struct{}
	tokens map[string]*Claim
	ids    map[string]*Claim // staged and masked container IDs
	// nothingHidden, if not nil, is closed when nothing is hidden any more.
	nothingHidden chan struct{}

	snapshots map[*Snapshot]struct{}
	buffers   map[*Buffer]struct{}
	passing   passing
}

// hide hides what carries the token, for the claim. It returns a channel that is closed once no
// answer is on its way undecoded. While the claim is active, none begins.
func (v *Visibility) hide(c *Claim, token string) <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if c.token != "" {
		delete(v.tokens, c.token)
	}
	c.token = token
	v.tokens[token] = c
	v.knowLocked(token)
	if !c.active {
		c.active = true
		v.active.Add(1)
	}
	for s := range v.snapshots {
		s.tokens[token] = struct{}{}
	}
	for id, owner := range v.ids {
		if owner == c {
			v.noteLocked(c, id, v.verdictLocked(id))
		}
	}
	return v.passing.idleLocked()
}

// staged says that the claim's successor is the container with that ID, or that there is none.
func (v *Visibility) staged(c *Claim, id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if c.successor != "" {
		delete(v.ids, c.successor)
	}
	c.successor = id
	if id != "" {
		v.ids[id] = c
		v.noteLocked(c, id, Hidden)
	}
}

// mask shows the claim's incumbent running.
func (v *Visibility) mask(c *Claim) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !c.active {
		return
	}
	v.ids[c.incumbent] = c
	v.noteLocked(c, c.incumbent, Masked)
}

// showLocked ends hiding and masking for the claim, and reports whether it masked its incumbent.
func (v *Visibility) showLocked(c *Claim) (masked bool) {
	masked = v.ids[c.incumbent] == c
	if v.tokens[c.token] == c {
		delete(v.tokens, c.token)
	}
	if len(v.tokens) == 0 && v.nothingHidden != nil {
		close(v.nothingHidden)
		v.nothingHidden = nil
	}
	for _, id := range []string{c.successor, c.incumbent} {
		if v.ids[id] == c {
			delete(v.ids, id)
		}
	}
	return masked
}

// Verdict returns how the container is shown now, for calls that name one. The ID must not be a
// prefix.
func (v *Visibility) Verdict(id string) Verdict {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.verdictLocked(id)
}

func (v *Visibility) verdictLocked(id string) Verdict {
	c := v.ids[id]
	switch {
	case c == nil || !c.active:
		return Shown
	case c.successor == id:
		return Hidden
	default:
		return Masked
	}
}

// States of a view's guard.
const (
	unguarded = iota // a token that the view does not hold says nothing
	unjudged         // no answer tells of containers yet
	guarded          // a container with a token that nobody knows is hidden
)

// Guard makes answers that tell of containers wait for [Visibility.Judged]. From now on, until
// [Visibility.Unguard], a container is hidden whose token nobody has told of, by [Visibility.Know]
// or by hiding it: such a container may come about late. Guard is for the time before the first
// call is served.
func (v *Visibility) Guard() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.known = map[string]struct{}{}
	for token := range v.tokens {
		v.known[token] = struct{}{}
	}
	v.guard.Store(unjudged)
}

// Know says that a container with that token is shown, unless something else hides it.
func (v *Visibility) Know(token string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.knowLocked(token)
}

func (v *Visibility) knowLocked(token string) {
	if v.known != nil {
		v.known[token] = struct{}{}
	}
}

// Judged lets answers go.
func (v *Visibility) Judged() { v.guard.CompareAndSwap(unjudged, guarded) }

// Unguard ends what [Visibility.Guard] began.
func (v *Visibility) Unguard() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.guard.Store(unguarded)
	v.known = nil
}

// Guarded reports whether the view is between [Visibility.Guard] and [Visibility.Unguard].
func (v *Visibility) Guarded() bool { return v.guard.Load() != unguarded }

// Unjudged reports whether the view is between [Visibility.Guard] and [Visibility.Judged].
func (v *Visibility) Unjudged() bool { return v.guard.Load() == unjudged }

// suspectLocked reports whether the token is one that nobody knows. That counts as long as there is
// a guard.
func (v *Visibility) suspectLocked(token string) bool {
	if v.known == nil || token == "" {
		return false
	}
	_, known := v.known[token]
	return !known
}
