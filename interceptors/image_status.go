// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// imageStatus keeps from kubelet that an image is there which somebody else has pulled with secrets. kubelet then pulls it, with the
// credentials of the pod that wants it, and remembers which they were. The answer is the runtime's for an image that is not there.
func (d *Director) imageStatus(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	answer, err := next(ctx, raw)
	if err != nil {
		return nil, err
	}
	var resp runtimeapi.ImageStatusResponse
	if _, err := decode(answer, &resp); err != nil {
		return nil, err
	}
	if resp.GetImage() == nil || !d.images.Unclaimed(resp.GetImage()) {
		return answer, nil
	}
	did(ctx, didHide)
	return encode(&runtimeapi.ImageStatusResponse{})
}
