// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// History is what kubelet has been shown, as far as later answers depend on it: which containers
// have been replaced, how far kubelet has come in learning of their successors, and which stops of
// kubelet's are in flight.
type History struct {
	*shared
	starts *Starts

	// inRelist is set from a list of sandboxes to one of all containers, which is the order in
	// which PLEG relists.
	inRelist atomic.Bool
	// exported is closed once the view goes on in another process.
	exported   chan struct{}
	exportOnce sync.Once

	// All following fields are guarded by mu.

	// successors are those of incumbents that were shown exited, by incumbent, until the incumbent
	// is removed.
	successors map[string]*successor
	// unacknowledged are the revealed successors that kubelet does not go by yet, by incumbent; see
	// [History.AckList].
	unacknowledged map[string]unacknowledged
	// stops counts kubelet's stops in flight, by the container or sandbox ID as given.
	stops map[string]int
	// predecessorStops are the IDs whose stops are in flight in the process before this one.
	predecessorStops []string
}

// maxSuccessors bounds what is remembered of reveals. Kubelet keeps one exited container per slot,
// so this is room for more slots than a node has.
const maxSuccessors = 4096

// successor is a container that took the place of an incumbent.
type successor struct {
	id, sandbox string
	slot        Slot
	// stoppedAfterReveal is set when kubelet stopped the incumbent after it had been shown exited.
	// Kubelet does that only to a container that it saw running before: it may be killing the pod.
	// grace is what kubelet gave, in seconds.
	stoppedAfterReveal bool
	grace              int64
}

// Successor is a container that took the place of an incumbent, as [History.StoppedAfterRevealIn]
// returns it.
type Successor struct {
	ID string
	// Grace is what kubelet gave the incumbent to stop, in seconds.
	Grace int64
}

// replacedLocked remembers that s has taken the place of the incumbent and is shown from now on.
// masked says that the incumbent was shown running until now: then kubelet must not learn of its
// exit before it goes by the successor.
func (h *History) replacedLocked(incumbent string, s successor, masked bool) {
	if masked && len(h.unacknowledged) < maxSuccessors {
		h.unacknowledged[incumbent] = unacknowledged{
			id: s.id, sandbox: s.sandbox, duringRelist: h.inRelist.Load(), since: time.Now(),
		}
		h.active.Add(1)
	}
	if incumbent != "" && len(h.successors) < maxSuccessors {
		h.successors[incumbent] = &s
	}
}

// StopBegins notes that a caller stops the container or sandbox, until the returned function is
// called.
func (h *History) StopBegins(id string) (done func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stops[id]++
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.stops[id]--; h.stops[id] == 0 {
			delete(h.stops, id)
		}
	}
}

// StopsElsewhere names the containers and sandboxes that kubelet is stopping by calls that another
// process still answers, in place of those named before.
func (h *History) StopsElsewhere(ids []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.predecessorStops = slices.Clone(ids)
}

// StopAfterReveal notes that kubelet stops the container, if that has been replaced.
func (h *History) StopAfterReveal(id string, grace int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := h.successors[id]; s != nil; s = h.successors[s.id] {
		s.stoppedAfterReveal, s.grace = true, grace
	}
}

// StoppedAfterReveal returns the container that runs in the slot although kubelet stopped its
// incumbent after the reveal, or "".
func (h *History) StoppedAfterReveal(slot Slot) string {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for _, s := range h.successors {
		if s.stoppedAfterReveal && s.slot == slot && h.successors[s.id] == nil {
			return s.id
		}
	}
	return ""
}

// StoppedAfterRevealIn returns the successors in the sandbox whose incumbents kubelet stopped after
// the reveal.
func (h *History) StoppedAfterRevealIn(sandbox string) []Successor {
	h.mu.RLock()
	defer h.mu.RUnlock()
	var out []Successor
	for _, s := range h.successors {
		if s.stoppedAfterReveal && s.sandbox == sandbox {
			out = append(out, Successor{ID: s.id, Grace: s.grace})
		}
	}
	return out
}

// Adopted notes that kubelet has taken the container over, or will. Kubelet stops that container
// itself, whatever it did to the one before.
func (h *History) Adopted(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.successors {
		if s.id == id {
			s.stoppedAfterReveal = false
		}
	}
}

// Forget drops what is remembered of a container that does not exist any more.
func (h *History) Forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.successors, id)
	h.acknowledgeLocked(func(incumbent string, u unacknowledged) bool { return incumbent == id || u.id == id })
	h.starts.forgetLocked(id)
}

// ForgetSandbox drops what is remembered of the containers of a sandbox that has been removed with
// them. The ID may be a prefix.
func (h *History) ForgetSandbox(id string) {
	if id == "" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(h.successors, func(_ string, s *successor) bool { return strings.HasPrefix(s.sandbox, id) })
	h.acknowledgeLocked(func(_ string, u unacknowledged) bool { return strings.HasPrefix(u.sandbox, id) })
}

// unacknowledged is a successor that kubelet may not know of yet.
type unacknowledged struct {
	id, sandbox string
	acked       ackStep
	// duringRelist says that at the reveal sandboxes had been listed and containers not yet.
	duringRelist bool
	since        time.Time
}

// relistTimeout bounds how long kubelet takes from listing sandboxes to listing containers.
const relistTimeout = 5 * time.Second

// early reports whether a list that is asked for now may belong to a relist that began before the
// reveal.
func (u unacknowledged) early() bool {
	return u.duringRelist && u.acked == ackNone && time.Since(u.since) < relistTimeout
}

// ackStep is how far kubelet has come in the calls by which it learns of a successor; see
// [History.AckList]. The numbers are written into a [State], which another version may read.
type ackStep int

const (
	ackNone          ackStep = iota
	ackSandboxList           // since the reveal, sandboxes have been listed,
	ackList                  // then containers, with the successor among them,
	ackSandboxStatus         // and then the sandbox's status has been asked for
)

// AckList notes that an answer lists these containers, in whatever state they are, and puts
// revealed successors before their incumbents.
//
// Kubelet lists containers, then asks for each one's status. If it learns that the incumbent exited
// before it has seen the successor, it starts the container once more, or fails the pod where that
// is never restarted. So the status of the incumbent says that it runs until kubelet has looked at
// the whole pod as PLEG does: it lists sandboxes, a list shows the successor, it asks for the
// sandbox's status, then for the successor's. A list or a status alone is not enough. It may come
// from another part of kubelet while PLEG still works through an older list: the log manager asks
// for the status of all running containers and never lists sandboxes. Kubelet asks for the newest
// container of a slot first, or in the order of the list; hence the order here.
//
// A relist that had listed its sandboxes before the reveal gets the containers as they were before
// it; see [Snapshot.HideUnacknowledged]. What it then asks of the incumbent is answered that way
// too, and PLEG looks again only at a pod whose list has changed.
func (h *History) AckList(list []*runtimeapi.Container) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for swapped := true; swapped; { // of a chain of three, one that is in its place may have to move again
		swapped = false
		for incumbent, u := range h.unacknowledged {
			i := slices.IndexFunc(list, func(c *runtimeapi.Container) bool { return c.GetId() == u.id })
			if i < 0 {
				continue
			}
			is := func(c *runtimeapi.Container) bool { return c.GetId() == incumbent }
			if j := slices.IndexFunc(list[:i], is); j >= 0 {
				list[i], list[j] = list[j], list[i]
				swapped = true
			}
			h.ackLocked(incumbent, ackList)
		}
	}
}

// ackLocked notes a call of kubelet's, if it comes right after the one that it has to follow.
func (h *History) ackLocked(incumbent string, step ackStep) {
	if u := h.unacknowledged[incumbent]; u.acked == step-1 {
		u.acked = step
		h.unacknowledged[incumbent] = u
	}
}

// AckSandboxList notes that sandboxes are being listed.
func (h *History) AckSandboxList() {
	h.inRelist.Store(true)
	if !h.Active() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for incumbent := range h.unacknowledged {
		h.ackLocked(incumbent, ackSandboxList)
	}
}

// AckSandboxStatus notes that the status of the sandbox is being asked for.
func (h *History) AckSandboxStatus(sandbox string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for incumbent, u := range h.unacknowledged {
		if u.sandbox == sandbox || u.sandbox == "" {
			h.ackLocked(incumbent, ackSandboxStatus)
		}
	}
}

// AckStatus notes that the status of the container has been asked for.
func (h *History) AckStatus(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.acknowledgeLocked(func(_ string, u unacknowledged) bool { return u.acked == ackSandboxStatus && u.id == id })
}

// acknowledgeLocked deletes the unacknowledged successors for which match returns true.
func (h *History) acknowledgeLocked(match func(incumbent string, u unacknowledged) bool) {
	for incumbent, u := range h.unacknowledged {
		if match(incumbent, u) {
			delete(h.unacknowledged, incumbent)
			h.active.Add(-1)
		}
	}
}

// Unacknowledged returns the successor of the container if kubelet does not go by it yet, or "".
func (h *History) Unacknowledged(id string) string {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.unacknowledged[id].id
}
