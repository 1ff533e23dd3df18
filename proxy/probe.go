// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// ProbeKey is the metadata key of a probe. The value is [Options.Probe]; the header of the
	// answer has it too.
	ProbeKey = "criproxy-probe"
	// ProbeMethod is the method that a probe calls: one that the director looks into while
	// something is hidden, and asks the view about at any time.
	ProbeMethod = runtimeapi.RuntimeService_ListContainers_FullMethodName
)

// probeUpstream bounds what a probe sends to the runtime. Whether the runtime answers is not asked,
// only whether the connection to it lets go of a call when it is time.
const probeUpstream = 100 * time.Millisecond

// isProbe reports whether a call is the proxy's own probe. Nobody else knows the value.
func (s *Server) isProbe(md metadata.MD) bool {
	v := md[ProbeKey]
	return len(v) == 1 && s.probe != "" && v[0] == s.probe
}

// probed answers a probe. It goes the whole way of a call, through the director and what it knows,
// but in the place of the runtime's answer is an empty one: a runtime that is away or hangs is no
// fault of the proxy's.
func (c *call) probed() error {
	_ = c.client.SetHeader(metadata.Pairs(ProbeKey, c.s.probe))
	if !c.diverted {
		ctx, cancel := context.WithTimeout(c.client.Context(), probeUpstream)
		defer cancel()
		var resp frame
		_ = c.conn.Invoke(ctx, runtimeapi.RuntimeService_Version_FullMethodName, newFrame(nil), &resp,
			grpc.ForceCodecV2(c.s.codec))
		resp.free()
	}
	return c.unary()
}
