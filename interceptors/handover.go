// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"maps"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// looksAtFirst are the methods whose calls may take long and need nothing of the view once the runtime has them: a stop that an operation has a part in is
// found by [View.Entangled]. The result of an exec goes out as the runtime gives it.
var looksAtFirst = map[string]bool{
	runtimeapi.ImageService_PullImage_FullMethodName:             true,
	runtimeapi.RuntimeService_StopContainer_FullMethodName:       true,
	runtimeapi.RuntimeService_StopPodSandbox_FullMethodName:      true,
	runtimeapi.RuntimeService_ExecSync_FullMethodName:            true,
	runtimeapi.RuntimeService_Exec_FullMethodName:                true,
	runtimeapi.RuntimeService_Attach_FullMethodName:              true,
	runtimeapi.RuntimeService_CheckpointContainer_FullMethodName: true,
}

var _ proxy.Depender = (*Director)(nil)

// Dependency implements [proxy.Depender].
func (d *Director) Dependency(method string) proxy.Dependency {
	switch {
	case looksAtFirst[method]:
		return proxy.UntilForwarded
	case d.always[method] != nil || d.active[method] != nil || d.stream[method] != nil:
		return proxy.UntilAnswered
	default:
		return proxy.Independent
	}
}

// Carry is what a view knows that no journal has, for the process that takes over: what kubelet has been shown, and what it has asked for.
type Carry struct {
	Heirs  map[string]CarriedHeir `json:"heirs,omitempty"`  // by incumbent
	Untold map[string]CarriedHeir `json:"untold,omitempty"` // by incumbent
	// Stops are the container and sandbox IDs with a stop of kubelet's in flight.
	Stops []string `json:"stops,omitempty"`
}

// CarriedHeir is a container that took the place of an incumbent.
type CarriedHeir struct {
	ID      string `json:"id"`
	Sandbox string `json:"sandbox"`
	Slot    Slot   `json:"slot,omitzero"`
	Late    bool   `json:"late,omitempty"`
	Grace   int64  `json:"grace,omitempty"`
	// Heard, Round and Since are those of an untold one.
	Heard heard     `json:"heard,omitempty"`
	Round bool      `json:"round,omitempty"`
	Since time.Time `json:"since,omitzero"`
}

// Carry returns what the next process must be told. Nothing may change the view any more.
func (v *View) Carry() Carry {
	v.leave.Do(func() { close(v.carried) })
	v.mu.RLock()
	defer v.mu.RUnlock()
	c := Carry{Heirs: map[string]CarriedHeir{}, Untold: map[string]CarriedHeir{}, Stops: slices.Sorted(maps.Keys(v.stops))}
	for incumbent, h := range v.heirs {
		c.Heirs[incumbent] = CarriedHeir{ID: h.id, Sandbox: h.sandbox, Slot: h.slot, Late: h.late, Grace: h.grace}
	}
	for incumbent, u := range v.untold {
		c.Untold[incumbent] = CarriedHeir{ID: u.id, Sandbox: u.sandbox, Heard: u.heard, Round: u.round, Since: u.since}
	}
	return c
}

// TakeOver makes a fresh view know what another one has carried.
func (v *View) TakeOver(c Carry) {
	v.StopsElsewhere(c.Stops)
	v.mu.Lock()
	defer v.mu.Unlock()
	for incumbent, h := range c.Heirs {
		v.heirs[incumbent] = &heir{id: h.ID, sandbox: h.Sandbox, slot: h.Slot, late: h.Late, grace: h.Grace}
	}
	for incumbent, h := range c.Untold {
		v.untold[incumbent] = untold{heir: heir{id: h.ID, sandbox: h.Sandbox}, heard: h.Heard, round: h.Round, since: h.Since}
		v.active.Add(1)
	}
}

// StopsElsewhere names the containers and sandboxes that kubelet is stopping by calls that another process still answers, in place of
// those named before.
func (v *View) StopsElsewhere(ids []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.elsewhere = slices.Clone(ids)
}

// Entangled returns the slots that a call of kubelet's and an operation both have to do with at this moment: neither can be left to
// another process.
func (v *View) Entangled() []Slot {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var slots []Slot
	for slot, c := range v.claims {
		if c.yield != nil || c.stoppingLocked(maps.Keys(v.stops)) {
			slots = append(slots, slot)
		}
	}
	slices.SortFunc(slots, func(a, b Slot) int { return strings.Compare(a.String(), b.String()) })
	return slots
}
