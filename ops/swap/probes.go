// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"cmp"
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
)

// A kubelet since 1.35 takes a new container for started where it took the one before for started
// and has not seen the slot empty in between (kubelet_pods.go convertToAPIContainerStatuses). Then
// nothing keeps the liveness probe back until the startup probe has its first turn with the new
// container, one period later at the most: that makes it unknown whether the container has started
// (prober/worker.go doProbe), for kubelet and for the other probes (kubelet.go syncLoopIteration,
// SetContainerStartup). Until then the new container is shown to begin in the future; no probe is
// made of such a one, but the startup probe has its turn all the same.

const (
	// MaxHoldProbes bounds hold_probes.
	MaxHoldProbes = time.Hour
	// defaultPeriod is the API's default periodSeconds of a probe.
	defaultPeriod = 10 * time.Second
	// probeLag is how long after the successor is shown kubelet's prober may learn of it, and of
	// the startup probe's first turn: both go through kubelet's main loop.
	probeLag = 2 * time.Second
	// ProbeCut is what kubelet cuts off: it keeps starts in whole seconds (status_manager.go
	// normalizeStatus), and counts less than a second to go for none (prober/worker.go doProbe).
	ProbeCut = 2 * time.Second
)

// ProbeHold returns for how long kubelet's probes of the successor are to be held. Where the
// command does not say, kubelet may tell the period of the startup probe. One that tells is new
// enough to need it.
func (v *Revealer) ProbeHold(ctx context.Context) time.Duration {
	if v.probes != nil {
		return *v.probes
	}
	var hold time.Duration
	if told := v.c.Spec.GetHoldProbes(); told != nil {
		hold = told.AsDuration()
	} else if v.c.Node.Pods != nil {
		ask, cancel := context.WithTimeout(ctx, podsapi.Timeout)
		defer cancel()
		pod, err := v.c.Node.Pods.Pod(ask, v.c.Op.Pod().GetUid())
		if err != nil {
			return 0 // asked again before it is needed
		}
		if period, is := pod.StartupPeriods[v.c.Spec.GetName()]; is {
			hold = min(cmp.Or(period, defaultPeriod)+probeLag, MaxHoldProbes)
		}
	}
	v.probes = &hold
	return hold
}

// HoldProbes holds kubelet's probes of the successor, which is about to be shown.
func (v *Revealer) HoldProbes(ctx context.Context) {
	if hold := v.ProbeHold(ctx); hold > 0 {
		v.c.Node.HoldProbes(v.c.Record().Successor, hold)
	}
}

// HoldNext holds the probes of the container that kubelet makes instead of taking the successor
// over, if it comes to that soon.
func (v *Revealer) HoldNext(ctx context.Context, within time.Duration) {
	hold := v.ProbeHold(ctx)
	if hold <= 0 {
		return
	}
	node, image, name := v.c.Node, v.c.kind.NextImage(), v.c.Spec.GetName()
	v.c.Node.View.WhenCreated(v.c.Slot(), time.Now().Add(within),
		func(id string, req *runtimeapi.CreateContainerRequest) bool {
			if image != "" && req.GetConfig().
				GetAnnotations()[criclone.AnnotationHash] != criclone.KubeletHash(name, image) {
				return false // kubelet has not seen the new spec yet
			}
			node.HoldProbes(id, hold)
			return true
		})
}
