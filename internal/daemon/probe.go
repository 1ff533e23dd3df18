// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// probeService tells other programs that a cri-proxy answers here. It is gRPC's health service
// under a name of our own: the runtime serves grpc.health.v1.Health, and kubelet's calls of that
// must reach the runtime. The self-probe says more.
const probeService = "criproxy.probe.v1.Health"

// registerProbe adds the probe service.
func registerProbe(r grpc.ServiceRegistrar) {
	desc := healthpb.Health_ServiceDesc
	desc.ServiceName = probeService
	r.RegisterService(&desc, health.NewServer())
}

// newProbeToken returns a token that tells this process' own probes from other calls.
func newProbeToken() string { return rand.Text() }

// probe makes one call through the proxy's own CRI listener at path. The connection is new, so that
// probe tests accepting too. The call goes the way of kubelet's lists: the proxy's handler, the
// director, the lock of the view and, while something is hidden, the interceptor. The runtime takes
// no part.
func probe(ctx context.Context, path, token string) error {
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return fmt.Errorf("self-probe: %w", err)
	}
	defer conn.Close()
	var resp runtimeapi.ListContainersResponse
	var header metadata.MD
	err = conn.Invoke(metadata.AppendToOutgoingContext(ctx, proxy.ProbeKey, token), proxy.ProbeMethod,
		&runtimeapi.ListContainersRequest{}, &resp, grpc.Header(&header))
	if err != nil {
		return fmt.Errorf("self-probe through %s: %w", path, err)
	}
	if got := header[proxy.ProbeKey]; len(got) != 1 || got[0] != token {
		return fmt.Errorf("self-probe through %s: somebody else has answered", path)
	}
	return nil
}
