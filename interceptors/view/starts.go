// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Starts says when containers are shown to have begun, where that is not when the runtime says.
type Starts struct {
	*shared

	known atomic.Int32 // the size of both maps, for calls that pass undecoded

	// All following fields are guarded by mu.

	began map[string]time.Time  // when the containers' processes really began
	held  map[string]heldProbes // containers that kubelet is kept from probing
}

// heldProbes is for how long kubelet is kept from probing a container.
type heldProbes struct {
	lasts time.Duration
	until time.Time // zero until the container is shown running
}

// SetStarted says when the container's process really began. It is for a container that was held at
// a gate, of which the runtime tells an earlier time. It counts until the container is removed.
func (s *Starts) SetStarted(id string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began[id] = at
	s.countLocked()
}

// HoldProbes keeps kubelet from probing the container for that long, beginning when the container
// is first shown running. As long as it runs, it is shown to have begun at the end of that time.
// Kubelet makes no probe before a container's start (prober/worker.go doProbe:
// InitialDelaySeconds), but a new container's startup probe says at its first turn that the
// container has not started yet, which keeps the other probes back from then on.
func (s *Starts) HoldProbes(id string, lasts time.Duration) {
	s.holdProbes(id, heldProbes{lasts: lasts})
}

// HoldProbesUntil is [Starts.HoldProbes] of a container that may have been shown before.
func (s *Starts) HoldProbesUntil(id string, until time.Time) {
	s.holdProbes(id, heldProbes{until: until})
}

func (s *Starts) holdProbes(id string, h heldProbes) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[id] = h
	s.countLocked()
}

func (s *Starts) forgetLocked(id string) {
	delete(s.began, id)
	delete(s.held, id)
	s.countLocked()
}

func (s *Starts) countLocked() { s.known.Store(int32(len(s.began) + len(s.held))) }

// StartsKnown reports whether the start of any container is to be corrected.
func (s *Starts) StartsKnown() bool { return s.known.Load() > 0 }

// Correct puts the start that is to be shown into the status of a container that is shown, and
// reports whether that changed the status.
func (s *Starts) Correct(st *runtimeapi.ContainerStatus) bool {
	if !s.StartsKnown() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.correctLocked(st)
}

func (s *Starts) correctLocked(st *runtimeapi.ContainerStatus) bool {
	at, ok := s.began[st.GetId()]
	if h, is := s.held[st.GetId()]; is && st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		if h.until.IsZero() {
			h.until = time.Now().Add(h.lasts)
			s.held[st.GetId()] = h
		}
		at, ok = h.until, true
	}
	if !ok || st.GetStartedAt() == 0 || st.GetStartedAt() == at.UnixNano() {
		return false
	}
	st.StartedAt = at.UnixNano()
	return true
}
