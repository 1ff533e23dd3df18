// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"sync"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// Waiters say who goes first in a slot: a restart goes before an upgrade that nobody has committed.
//
// A prepared upgrade keeps its slot until its caller commits it, which a budget or a pause may put
// off for an hour, and nothing is lost if it is taken back and prepared again. A restart is wanted
// now. So a restart has such an upgrade taken back, and no upgrade takes the slot while a restart
// waits for it. A committed upgrade runs on: the pod's spec may have been changed for it, and it
// ends soon.
type Waiters struct {
	mu sync.Mutex // guards all following fields
	// held has the upgrades that have a slot.
	held map[view.Slot]*Operation
	// wanted has the slots that restarts wait for.
	wanted map[view.Slot]*wanted
}

// wanted is how many restarts wait for a slot.
type wanted struct {
	restarts int
	over     chan struct{} // closed when no restart waits any more
}

// NewWaiters returns the waiters of slots that nobody has.
func NewWaiters() *Waiters {
	return &Waiters{held: map[view.Slot]*Operation{}, wanted: map[view.Slot]*wanted{}}
}

// Want says that a restart waits for the slot. It returns the upgrade that has the slot, which the
// caller must have taken back; nil for none. The caller must call got when it waits no more.
func (ws *Waiters) Want(slot view.Slot) (holder *Operation, got func()) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.wanted[slot]
	if w == nil {
		w = &wanted{over: make(chan struct{})}
		ws.wanted[slot] = w
	}
	w.restarts++
	return ws.held[slot], func() {
		ws.mu.Lock()
		defer ws.mu.Unlock()
		if w.restarts--; w.restarts == 0 {
			delete(ws.wanted, slot)
			close(w.over)
		}
	}
}

// Hold says that the upgrade has the slot. If restarts wait for the slot, Hold returns a channel
// that is closed when none does any more: the upgrade must give the slot up until then.
func (ws *Waiters) Hold(slot view.Slot, upgrade *Operation) <-chan struct{} {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if w := ws.wanted[slot]; w != nil {
		return w.over
	}
	ws.held[slot] = upgrade
	return nil
}

// Keep says that the upgrade had the slot in the process before this one. It reports whether a
// restart waits for the slot: the caller must then have the upgrade taken back.
func (ws *Waiters) Keep(slot view.Slot, upgrade *Operation) (isWanted bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.held[slot] = upgrade
	return ws.wanted[slot] != nil
}

// Leave ends Hold.
func (ws *Waiters) Leave(slot view.Slot, upgrade *Operation) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.held[slot] == upgrade {
		delete(ws.held, slot)
	}
}
