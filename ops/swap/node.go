// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/lost"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/room"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// Node is what the operations on all containers of the node share.
type Node struct {
	*crinode.Client
	View       *view.View
	Records    *store.Records
	Overrides  *store.Overrides
	Switchover *switchover.Prober
	Hooks      *hooks.Runner
	Images     *imagechange.Node
	// Pods may be nil.
	Pods    podsapi.Pods
	Waiters *operation.Waiters
	Tokens  *lost.Tokens
	Lost    *lost.Keeper
	// Active returns the operations that have not finished. The caller must hold no lock of an
	// operation.
	Active func() []*operation.Operation
	Rooms  *room.Node
	// LogLinks is where kubelet keeps a symlink per container log for log shippers.
	LogLinks string
	// LateCreate is how long after its call was cut off, or after the end of the process that made
	// the call, a CreateContainer may still bring a container about.
	LateCreate time.Duration
	Metrics    Metrics
}

// Metrics are what operations on containers count.
type Metrics struct {
	Gap          *prometheus.HistogramVec // by kind and method
	GateFailures prometheus.Counter
}

// RequestOf returns the request that made the container: as recorded, or, for one that is older
// than the proxy, put together from the runtime's verbose status.
func (n *Node) RequestOf(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, error) {
	if req := n.Records.Request(id); req != nil {
		return req, nil
	}
	return n.ReadRequest(ctx, id, sandbox)
}

// SetStarted notes when the application of a container that was held at a gate began.
func (n *Node) SetStarted(id string, at time.Time) {
	n.Records.SetStarted(id, at)
	n.View.SetStarted(id, at)
}

// HoldProbes holds kubelet's probes of the container. The next process does not know when kubelet
// was shown the container: it has the least that it can be.
func (n *Node) HoldProbes(id string, hold time.Duration) {
	hold += ProbeCut
	n.Records.SetHeld(id, time.Now().Add(hold))
	n.View.HoldProbes(id, hold)
}

// Overridden returns the request as it is when it goes to the runtime.
func (n *Node) Overridden(
	ctx context.Context, slot view.Slot, req *runtimeapi.CreateContainerRequest,
) *runtimeapi.CreateContainerRequest {
	if !n.Overrides.Any() {
		return req
	}
	out := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
	if _, err := n.Overrides.Apply(ctx, slot, out); err != nil {
		n.Log.WithError(err).Warn("the image that overrides the one in the pod's spec is not known")
	}
	return out
}

// MatchResources gives the container the resources that kubelet asks for, if they have changed
// since the container was made.
func (n *Node) MatchResources(ctx context.Context, id string, asked *runtimeapi.CreateContainerRequest) error {
	ours := n.Records.Request(id)
	want := asked.GetConfig().GetLinux().GetResources()
	if ours == nil || want == nil || !criclone.ResourcesDiffer(ours, asked) {
		return nil
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	_, err := n.Runtime.UpdateContainerResources(call, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: want,
	})
	if err != nil {
		return err
	}
	if b, err := proto.Marshal(want); err == nil {
		n.Records.Updated(id, b)
	}
	return nil
}

// TakeBack takes an upgrade back that nobody has committed, for a restart, which may be nil.
func (n *Node) TakeBack(upgrade, to *operation.Operation) {
	why := "it gave way to a restart, and can be prepared again"
	if to != nil {
		why = "it gave way to restart " + to.UID() + ", and can be prepared again"
	}
	log := n.Log.WithFields(logrus.Fields{"op": upgrade.UID(), "pod": upgrade.PodName(), "reason": why})
	switch done, err := upgrade.CancelUncommitted(why); {
	case err != nil:
		log.WithError(err).Warn("a prepared upgrade was not taken back")
	case done:
		log.Info("a prepared upgrade is taken back")
	}
}

// Holder returns the UID of the operation that has the slot, as far as the journal tells: an
// operation that has just taken the slot has written nothing yet.
func (n *Node) Holder(slot view.Slot) string {
	for _, o := range n.Active() {
		for i, rec := range o.Records() {
			if rec.HoldsSlot() && o.Container(i).Slot() == slot {
				return o.UID()
			}
		}
	}
	return ""
}
