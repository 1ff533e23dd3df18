// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"maps"
	"slices"
	"time"
)

// State is what a view knows that no journal has, for the process that takes over: what kubelet has
// been shown, and what it has asked for. Its JSON form crosses versions.
type State struct {
	Successors     map[string]StateSuccessor `json:"heirs,omitempty"`  // by incumbent
	Unacknowledged map[string]StateSuccessor `json:"untold,omitempty"` // by incumbent
	// Stops are the container and sandbox IDs with a stop of kubelet's in flight.
	Stops []string `json:"stops,omitempty"`
}

// StateSuccessor is a container that took the place of an incumbent.
type StateSuccessor struct {
	ID                 string `json:"id"`
	Sandbox            string `json:"sandbox"`
	Slot               Slot   `json:"slot,omitzero"`
	StoppedAfterReveal bool   `json:"late,omitempty"`
	Grace              int64  `json:"grace,omitempty"`
	// Acked, DuringRelist and Since are those of an unacknowledged one.
	Acked        ackStep   `json:"heard,omitempty"`
	DuringRelist bool      `json:"round,omitempty"`
	Since        time.Time `json:"since,omitzero"`
}

// Export returns what the next process must be told. Nothing may change the view any more.
func (h *History) Export() State {
	h.exportOnce.Do(func() { close(h.exported) })
	h.mu.RLock()
	defer h.mu.RUnlock()
	st := State{
		Successors:     map[string]StateSuccessor{},
		Unacknowledged: map[string]StateSuccessor{},
		Stops:          slices.Sorted(maps.Keys(h.stops)),
	}
	for incumbent, s := range h.successors {
		st.Successors[incumbent] = StateSuccessor{
			ID: s.id, Sandbox: s.sandbox, Slot: s.slot, StoppedAfterReveal: s.stoppedAfterReveal, Grace: s.grace,
		}
	}
	for incumbent, u := range h.unacknowledged {
		st.Unacknowledged[incumbent] = StateSuccessor{
			ID: u.id, Sandbox: u.sandbox, Acked: u.acked, DuringRelist: u.duringRelist, Since: u.since,
		}
	}
	return st
}

// Import makes a fresh view know what another one has exported.
func (h *History) Import(st State) {
	h.StopsElsewhere(st.Stops)
	h.mu.Lock()
	defer h.mu.Unlock()
	for incumbent, s := range st.Successors {
		h.successors[incumbent] = &successor{
			id: s.ID, sandbox: s.Sandbox, slot: s.Slot, stoppedAfterReveal: s.StoppedAfterReveal, grace: s.Grace,
		}
	}
	for incumbent, s := range st.Unacknowledged {
		h.unacknowledged[incumbent] = unacknowledged{
			id: s.ID, sandbox: s.Sandbox, acked: s.Acked, duringRelist: s.DuringRelist, since: s.Since,
		}
		h.active.Add(1)
	}
}

// Carry is [History.Export], until its callers say so.
func (h *History) Carry() State { return h.Export() }

// TakeOver is [History.Import], until its callers say so.
func (h *History) TakeOver(st State) { h.Import(st) }
