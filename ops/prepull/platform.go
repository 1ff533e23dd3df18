// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"runtime"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/imageinfo"
)

// checkPlatform returns a *failure if the image that is there is not made for this node. The runtime says so by itself of one with several
// manifests only; what it has of another stays on the node. Who waits for the pull looks at the image himself.
func (p *Puller) checkPlatform(ctx context.Context, u *pull) error {
	p.mu.Lock()
	awaited := u.urgent
	p.mu.Unlock()
	if awaited {
		return nil
	}
	st, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: p.spec(u), Verbose: true})
	if err != nil {
		return fmt.Errorf("asking the runtime for the image's platform: %w", err)
	}
	config := imageinfo.Config(st)
	if config == nil {
		return nil
	}
	if err := imageinfo.CheckPlatform(config, u.named.String(), runtime.GOOS, runtime.GOARCH); err != nil {
		return &failure{reason: opsv1.PullReasonInvalidImage, final: true, message: fmt.Sprintf("the image is not made for this node's platform (%v): "+
			"push one for it, or a list of manifests that has one, or choose other nodes", err)}
	}
	return nil
}
