// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

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
