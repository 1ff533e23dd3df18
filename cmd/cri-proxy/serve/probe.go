// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package serve

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// The self-probe is gRPC's health service under a name of our own, because the
// runtime serves grpc.health.v1.Health and kubelet's calls of that must reach it.
const (
	probeService = "criproxy.probe.v1.Health"
	probeMethod  = "/" + probeService + "/Check"
)

// registerProbe adds the service that answers the self-probe.
func registerProbe(r grpc.ServiceRegistrar) {
	desc := healthpb.Health_ServiceDesc
	desc.ServiceName = probeService
	r.RegisterService(&desc, health.NewServer())
}

// probe makes one call through the proxy's own CRI listener at path, on a
// connection of its own, so that accepting is probed too. The runtime takes no part.
func probe(ctx context.Context, path string) error {
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
	var resp healthpb.HealthCheckResponse
	if err := conn.Invoke(ctx, probeMethod, &healthpb.HealthCheckRequest{}, &resp); err != nil {
		return fmt.Errorf("self-probe through %s: %w", path, err)
	}
	if resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("self-probe through %s: answered %s", path, resp.GetStatus())
	}
	return nil
}
