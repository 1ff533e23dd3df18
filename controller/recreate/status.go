// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"cmp"
	"context"
	"slices"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/kstatus"
)

// untouched says that no node has taken an operation of the request.
func (p *pass) untouched() bool {
	return !slices.ContainsFunc(p.containers,
		func(c *container) bool { return c.op != nil || c.state.Phase != pending })
}

func (p *pass) phase() appsv1alpha1.ContainerRecreateRequestPhase {
	if !unreadySince(p.crr).IsZero() || !p.allPending() || p.crr.Status.Phase == recreating {
		return recreating
	}
	return pending
}

func (p *pass) allPending() bool {
	return !slices.ContainsFunc(p.containers, func(c *container) bool { return c.state.Phase != pending })
}

func (p *pass) states() []appsv1alpha1.ContainerRecreateRequestContainerRecreateState {
	var states []appsv1alpha1.ContainerRecreateRequestContainerRecreateState
	for _, c := range p.containers {
		states = append(states, c.state)
	}
	return states
}

// minor says that a status differs from the one before in nothing that a client waits for.
func minor(before, after *appsv1alpha1.ContainerRecreateRequestStatus) bool {
	if after.Phase != before.Phase && after.Phase != pending {
		return false
	}
	for i, s := range after.ContainerRecreateStates {
		if i >= len(before.ContainerRecreateStates) {
			if s.Phase != pending {
				return false
			}
		} else if s.Phase != before.ContainerRecreateStates[i].Phase {
			return false
		}
	}
	return true
}

// patch writes the change of metadata and spec since before.
func (p *pass) patch(ctx context.Context, before *appsv1alpha1.ContainerRecreateRequest) error {
	return p.writer.Patch(ctx, p.crr, before)
}

// writeStatus writes next if it differs, and then the Events that go with it.
func (p *pass) writeStatus(ctx context.Context, next *appsv1alpha1.ContainerRecreateRequestStatus) error {
	next.ObservedGeneration = p.crr.Generation
	tellReady(next)
	tellInFields(p.crr, p.containers, next)
	before := p.crr.DeepCopy()
	p.crr.Status = *next
	wrote, err := p.writer.PatchStatus(ctx, p.crr, before)
	if wrote {
		p.memory.lastWrite = p.r.now()
		p.events.tell(&before.Status)
	}
	return err
}

// tellReady says for kstatus how the request stands.
func tellReady(s *appsv1alpha1.ContainerRecreateRequestStatus) {
	standing, reason := kstatus.AtWork, string(cmp.Or(s.Phase, pending))
	if s.CompletionTime != nil {
		standing, reason = kstatus.Current, reasonRecreated
		for _, c := range s.ContainerRecreateStates {
			if c.Phase == failed {
				standing, reason = kstatus.Failed, reasonContainersFailed
			}
		}
	}
	kstatus.Set(&s.Conditions, s.ObservedGeneration, standing, reason, s.Message)
}
