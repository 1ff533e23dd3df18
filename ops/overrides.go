// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// writeEnded writes the end of overrides that a call of kubelet's has ended, until ctx ends. What
// is left then goes with the next write, or with the end of the engine.
func (e *Engine) writeEnded(ctx context.Context) {
	for {
		select {
		case <-e.node.Overrides.Dirty():
			e.node.Overrides.Flush()
		case <-ctx.Done():
			return
		}
	}
}

// forgetOnRemoval ends overrides of pods that are gone, whenever a sandbox is removed, until ctx
// ends. A pod may have several sandboxes; kubelet removes the older ones.
func (e *Engine) forgetOnRemoval(ctx context.Context) {
	for {
		select {
		case <-e.node.Overrides.Removed():
		case <-ctx.Done():
			return
		}
		e.forgetOverrides(ctx)
	}
}

// forgetOverrides ends overrides of pods that have no sandbox any more.
func (e *Engine) forgetOverrides(ctx context.Context) {
	// The overrides are read first: a pod that gets one after that had a sandbox at least until
	// then.
	all := e.node.Overrides.List()
	if len(all) == 0 {
		return
	}
	list, err := e.node.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		if ctx.Err() == nil {
			e.log.WithError(err).Warn("image overrides not tidied")
		}
		return
	}
	there := map[string]bool{}
	for _, sandbox := range list.GetItems() {
		there[sandbox.GetMetadata().GetUid()] = true
	}
	for _, o := range all {
		if there[o.PodUID] {
			continue
		}
		e.log.WithFields(logrus.Fields{
			"pod": o.Namespace + "/" + o.Pod, "container": o.Container, "image": o.Image,
		}).Info("image override ended: the pod is gone")
		e.node.Overrides.Set(o.Slot(), nil)
	}
	e.node.Overrides.Flush()
}

// ListOverrides implements [opsv1.OpsServer].
func (s *Server) ListOverrides(context.Context, *opsv1.ListOverridesRequest) (*opsv1.ListOverridesResponse, error) {
	resp := &opsv1.ListOverridesResponse{}
	for _, o := range s.e.node.Overrides.List() {
		resp.Overrides = append(resp.Overrides, &opsv1.ImageOverride{
			Pod: &opsv1.PodRef{Namespace: o.Namespace, Name: o.Pod, Uid: o.PodUID}, Container: o.Container,
			Image: o.Image, ImageId: o.ImageID, SpecImage: o.SpecImage,
			Since: timestamppb.New(o.Since), Requester: o.Requester, OperationUid: o.Operation,
		})
	}
	return resp, nil
}
