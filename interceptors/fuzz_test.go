// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// FuzzDirector sends any bytes as request and response through every interceptor. None may panic;
// an error is a status or a [proxy.PassError]; and with nothing to hide all bytes come through.
func FuzzDirector(f *testing.F) {
	seed := func(req, resp proto.Message) { f.Add(marshal(f, req), marshal(f, resp)) }
	seed(
		&runtimeapi.ListContainersRequest{Filter: inState(runtimeapi.ContainerState_CONTAINER_RUNNING)},
		withUnknown(&runtimeapi.ListContainersResponse{Containers: containers()}),
	)
	seed(
		&runtimeapi.ContainerStatusRequest{ContainerId: incumbent},
		&runtimeapi.ContainerStatusResponse{Status: exited(incumbent)},
	)
	seed(&runtimeapi.ContainerStatusRequest{ContainerId: successor},
		&runtimeapi.ContainerStatusResponse{Status: staged()})
	seed(
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: "nobody's"},
		&runtimeapi.PodSandboxStatusResponse{ContainersStatuses: []*runtimeapi.ContainerStatus{staged(),
			exited(incumbent)}},
	)
	seed(&runtimeapi.GetEventsRequest{}, event(successor, created, staged()))
	seed(
		&runtimeapi.CreateContainerRequest{Config: &runtimeapi.ContainerConfig{Labels: labels("web")}},
		&runtimeapi.CreateContainerResponse{ContainerId: "x"},
	)
	seed(
		&runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: incumbent, Linux: &runtimeapi.LinuxContainerResources{CpusetCpus: "1"},
		},
		&runtimeapi.UpdateContainerResourcesResponse{},
	)
	seed(
		&runtimeapi.ListPodSandboxStatsRequest{},
		&runtimeapi.ListPodSandboxStatsResponse{Stats: podStats(successor, web)},
	)
	seed(
		&runtimeapi.ListPodSandboxStatsRequest{},
		&runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: podMetrics(successor, web)},
	)
	f.Add([]byte{0xff}, []byte{0x0a, 0x01})
	f.Add([]byte(nil), []byte(nil))

	// Calls that wait for an operation end with the call's context.
	over, cancel := context.WithCancel(f.Context())
	cancel()
	sound := func(t *testing.T, method string, err error) {
		var pass *proxy.PassError
		if _, isStatus := status.FromError(err); err != nil && !isStatus && !errors.As(err, &pass) {
			t.Errorf("%s: an error that is neither a status nor a PassError: %v", method, err)
		}
	}
	f.Fuzz(func(t *testing.T, req, resp []byte) {
		for _, active := range []bool{false, true} {
			b := newBed(t)
			if active {
				c := b.swapping()
				defer c.Release()
			}
			for _, m := range unaryMethods() {
				take := b.director.Unary(m)
				if take == nil {
					continue
				}
				out, err := take(over, m, bytes.Clone(req), func(_ context.Context, got []byte) ([]byte, error) {
					if !active && !bytes.Equal(got, req) {
						t.Errorf("%s: the request was changed with nothing to hide", m)
					}
					return bytes.Clone(resp), nil
				})
				sound(t, m, err)
				if !active && err == nil && !bytes.Equal(out, resp) {
					t.Errorf("%s: the answer was changed with nothing to hide", m)
				}
			}
			for _, m := range streamMethods() {
				take := b.director.Stream(m)
				if take == nil {
					continue
				}
				up, filter, err := take(over, m, bytes.Clone(req))
				sound(t, m, err)
				if err != nil {
					continue
				}
				out, err := filter.Message(bytes.Clone(resp))
				sound(t, m, err)
				filter.Close()
				if filtered := m == methodStreamList && !bytes.Equal(up, req); active || filtered {
					continue // a filter by state is always evaluated by the director
				}
				if !bytes.Equal(up, req) {
					t.Errorf("%s: the request was changed with nothing to hide", m)
				}
				if err != nil || len(out) != 1 || !bytes.Equal(out[0], resp) {
					t.Errorf("%s: the message was changed with nothing to hide", m)
				}
			}
		}
	})
}

var _ proxy.Passer = (*interceptors.Director)(nil)
