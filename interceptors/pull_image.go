// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// pullImage lets pulls ahead of time give way to kubelet's. The call itself goes through as it is, of which only the image's name is read; its answer is
// looked at while there is an image that kubelet has not pulled yet.
func pullImage(pulls Pulls, images Images) proxy.UnaryInterceptor {
	return func(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
		name := ""
		if req, err := decode(raw, &runtimeapi.PullImageRequest{}); err == nil { // what is wrong with it, the runtime says
			name = req.GetImage().GetImage()
		}
		defer pulls.KubeletPulls(name)()
		answer, err := next(ctx, raw)
		if err == nil && images != nil && images.AnyUnclaimed() {
			if pulled, err := decode(answer, &runtimeapi.PullImageResponse{}); err == nil {
				images.Claimed(pulled.GetImageRef())
			}
		}
		return answer, err
	}
}
