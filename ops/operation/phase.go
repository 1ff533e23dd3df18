// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"slices"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// course are the phases of a container before it has ended, in order.
var course = []opsv1.Phase{
	opsv1.Phase_PHASE_UNSPECIFIED, opsv1.Phase_PHASE_PENDING, opsv1.Phase_PHASE_PULLING, opsv1.Phase_PHASE_STAGING,
	opsv1.Phase_PHASE_PREPARED, opsv1.Phase_PHASE_ARMED, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING,
	opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_ADOPTING,
}

// HasEnded reports whether a container in this phase has ended.
func HasEnded(p opsv1.Phase) bool { return !slices.Contains(course, p) }

// PhaseName is the phase in lower case: pulling, staging and so on.
func PhaseName(p opsv1.Phase) string {
	return strings.ToLower(strings.TrimPrefix(p.String(), "PHASE_"))
}

// leastAdvanced is the least advanced phase of the containers that have not ended.
func leastAdvanced(cs []*opsv1.ContainerOperation) opsv1.Phase {
	least := len(course)
	for _, c := range cs {
		if i := slices.Index(course, c.GetPhase()); i >= 0 {
			least = min(least, i)
		}
	}
	if least == len(course) {
		return opsv1.Phase_PHASE_REVEALING // all have ended
	}
	return course[least]
}

// phaseLocked is the phase of a running operation. If a container of an upgrade has failed, the
// upgrade is about to be taken back: it is neither prepared nor armed then, so that its caller does
// not go on. The caller holds o.mu.
func (o *Operation) phaseLocked() opsv1.Phase {
	phase := leastAdvanced(o.op.GetContainers())
	if o.upgrade != nil && phase == opsv1.Phase_PHASE_REVEALING {
		phase = opsv1.Phase_PHASE_ADOPTING // all have ended, which is later
	}
	if o.upgrade != nil && !o.pastPointOfNoReturn && (o.cancelSaid || anyFailed(o.op.GetContainers())) &&
		slices.Index(course, phase) > slices.Index(course, opsv1.Phase_PHASE_STAGING) {
		return opsv1.Phase_PHASE_STAGING
	}
	return phase
}

// anyFailed reports whether a container has failed or was cancelled.
func anyFailed(cs []*opsv1.ContainerOperation) bool {
	return slices.ContainsFunc(cs, func(c *opsv1.ContainerOperation) bool {
		return c.GetPhase() == opsv1.Phase_PHASE_FAILED || c.GetPhase() == opsv1.Phase_PHASE_CANCELLED
	})
}

// Stay is when an operation entered a phase, as far as this process has seen it.
type Stay struct {
	Phase opsv1.Phase
	Since time.Time
}

// maxStays bounds the phases that are kept of an operation: those of one with many containers that
// pass them one by one.
const maxStays = 64

// enterLocked notes the present phase. The caller holds o.mu.
func (o *Operation) enterLocked() {
	running := func(c *opsv1.ContainerOperation) bool { return !HasEnded(c.GetPhase()) }
	if !slices.ContainsFunc(o.op.GetContainers(), running) && o.op.GetFinishTime() == nil {
		return // all containers have ended, the phase is only that of the last ones
	}
	if n := len(o.stays); n == maxStays || n > 0 && o.stays[n-1].Phase == o.op.GetPhase() {
		return
	}
	o.stays = append(o.stays, Stay{o.op.GetPhase(), time.Now()})
}
