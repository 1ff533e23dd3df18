// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
)

// needsPath are the commands that need kubelet's calls to go through this proxy.
var needsPath = map[string]bool{
	opsv1.Ops_Restart_FullMethodName:        true,
	opsv1.Ops_PrepareUpgrade_FullMethodName: true,
	opsv1.Ops_CommitUpgrade_FullMethodName:  true,
}

// refuseBypassed refuses commands that would show kubelet what it must not see.
func (n *node) refuseBypassed(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	if !needsPath[info.FullMethod] {
		return handler(ctx, req)
	}
	s := bypassstate.Read(n.config.StateDir)
	if s == nil {
		return handler(ctx, req)
	}
	st := status.Newf(codes.FailedPrecondition, "cri-proxy is bypassed on this node %s; "+
		"cri-proxy bypass off ends that", s)
	reason := &errdetails.ErrorInfo{Reason: opsv1.ErrorReasonBypassed, Domain: opsv1.ErrorDomain}
	if detailed, err := st.WithDetails(reason); err == nil {
		st = detailed
	}
	return nil, st.Err()
}

// bypassed is the text for [opsv1.NodeInfoResponse].
func (n *node) bypassed() string {
	if s := bypassstate.Read(n.config.StateDir); s != nil {
		return s.String()
	}
	return ""
}

// bypassMetric is 1 while kubelet is led past the proxy.
func (n *node) bypassMetric() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_bypassed", Help: "1 while kubelet is led past cri-proxy, to the runtime.",
	}, func() float64 {
		if bypassstate.Read(n.config.StateDir) != nil {
			return 1
		}
		return 0
	})
}
