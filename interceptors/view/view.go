// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"sync"
	"sync/atomic"
	"time"
)

// StagedAnnotation marks a container that an operation created. Its value is the token of that
// stage. The container is hidden as long as the [View] holds the token, and only then: it keeps the
// annotation for life without staying hidden, and after a crash it is hidden before its ID is
// known.
const StagedAnnotation = "cri-proxy.io/staged"

// View is what kubelet must see. Its methods are those of its parts. The zero value is not usable;
// see [New]. All methods are safe for concurrent use.
type View struct {
	*shared
	*Slots
	*Visibility
	*History
	*Starts
}

// shared is what the parts of a view have in common. All parts are under one lock, because a reveal
// changes all of them: two locks would let a call see half of it.
type shared struct {
	// active counts the reasons to change answers: the active claims and the unacknowledged
	// successors. A call that passes undecoded reads only this.
	active atomic.Int32

	mu sync.RWMutex // guards the fields that the parts name
}

// Active reports whether any answer to kubelet may need a change.
func (s *shared) Active() bool { return s.active.Load() > 0 }

// New returns a view that hides and masks nothing.
func New() *View {
	common := &shared{}
	starts := &Starts{shared: common, began: map[string]time.Time{}, held: map[string]heldProbes{}}
	history := &History{
		shared: common, starts: starts, exported: make(chan struct{}),
		successors:     map[string]*successor{},
		unacknowledged: map[string]unacknowledged{},
		stops:          map[string]int{},
	}
	visibility := &Visibility{
		shared: common, history: history, starts: starts,
		tokens:    map[string]*Claim{},
		ids:       map[string]*Claim{},
		snapshots: map[*Snapshot]struct{}{},
		buffers:   map[*Buffer]struct{}{},
		passing:   passing{calls: map[string]int{}, unknown: map[*unknownCall]struct{}{}},
	}
	slots := &Slots{
		shared: common, visibility: visibility, history: history,
		claims:  map[Slot]*Claim{},
		waiters: map[Slot][]chan *Claim{},
		strays:  map[*Claim]struct{}{},
		awaited: map[Slot]awaited{},
	}
	return &View{shared: common, Slots: slots, Visibility: visibility, History: history, Starts: starts}
}
