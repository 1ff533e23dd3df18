// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// pullImage lets pulls ahead of time give way to kubelet's. The call itself goes through undecoded.
func pullImage(pulls Pulls) proxy.UnaryInterceptor {
	return func(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
		defer pulls.KubeletPulls()()
		return next(ctx, raw)
	}
}
