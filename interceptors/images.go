// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// imageCalls takes the calls for images.
type imageCalls struct {
	pulls  Pulls  // nil: no pull is taken
	images Images // nil: no status is taken
}

// imageStatus hides from kubelet an image that somebody else has pulled with secrets. Kubelet then
// pulls it, with the credentials of the pod that wants it, and remembers which they were. The
// answer is the runtime's for an image that is not there.
func (i *imageCalls) imageStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	answer, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	var resp runtimeapi.ImageStatusResponse
	if _, err := decode(answer, &resp); err != nil {
		return nil, err
	}
	if resp.GetImage() == nil || !i.images.Unclaimed(resp.GetImage()) {
		return answer, nil
	}
	did(ctx, didHide)
	return encode(&runtimeapi.ImageStatusResponse{})
}

// pullImage makes pre-pulls yield to kubelet's pull. The call goes through as it is: only the
// image's name is read from it. Its answer is decoded while there is an image that kubelet has not
// pulled yet.
func (i *imageCalls) pullImage(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	name := ""
	if req, err := decode(raw, &runtimeapi.PullImageRequest{}); err == nil { // the runtime refuses what is wrong
		name = req.GetImage().GetImage()
	}
	defer i.pulls.KubeletPulls(name)()
	answer, err := next(ctx, raw)
	if err == nil && i.images != nil && i.images.AnyUnclaimed() {
		if pulled, err := decode(answer, &runtimeapi.PullImageResponse{}); err == nil {
			i.images.Claimed(pulled.GetImageRef())
		}
	}
	return answer, err
}
