// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func stats(ids ...string) []*runtimeapi.ContainerStats {
	var out []*runtimeapi.ContainerStats
	for _, id := range ids {
		out = append(out, withUnknown(&runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{Id: id}}))
	}
	return out
}

func podStats(ids ...string) []*runtimeapi.PodSandboxStats {
	return []*runtimeapi.PodSandboxStats{
		{
			Attributes: &runtimeapi.PodSandboxAttributes{Id: sandbox},
			Linux:      &runtimeapi.LinuxPodSandboxStats{Containers: stats(ids...)},
		},
		{Attributes: &runtimeapi.PodSandboxAttributes{Id: "windows"}},
	}
}

func podMetrics(ids ...string) []*runtimeapi.PodSandboxMetrics {
	m := &runtimeapi.PodSandboxMetrics{PodSandboxId: sandbox}
	for _, id := range ids {
		m.ContainerMetrics = append(m.ContainerMetrics, withUnknown(&runtimeapi.ContainerMetrics{ContainerId: id}))
	}
	return []*runtimeapi.PodSandboxMetrics{m, {PodSandboxId: "empty"}}
}

// Stats and metrics leave hidden containers out and change nothing else.
func TestStatsLeaveHiddenContainersOut(t *testing.T) {
	all, seen := []string{web, successor, incumbent}, []string{web, incumbent}
	cases := []struct {
		method  string
		in, out proto.Message
	}{
		{
			runtimeapi.RuntimeService_ListContainerStats_FullMethodName,
			&runtimeapi.ListContainerStatsResponse{Stats: stats(all...)},
			&runtimeapi.ListContainerStatsResponse{Stats: stats(seen...)},
		},
		{
			runtimeapi.RuntimeService_StreamContainerStats_FullMethodName,
			&runtimeapi.StreamContainerStatsResponse{ContainerStats: stats(all...)},
			&runtimeapi.StreamContainerStatsResponse{ContainerStats: stats(seen...)},
		},
		{
			runtimeapi.RuntimeService_PodSandboxStats_FullMethodName,
			&runtimeapi.PodSandboxStatsResponse{Stats: podStats(all...)[0]},
			&runtimeapi.PodSandboxStatsResponse{Stats: podStats(seen...)[0]},
		},
		{
			runtimeapi.RuntimeService_PodSandboxStats_FullMethodName, &runtimeapi.PodSandboxStatsResponse{},
			&runtimeapi.PodSandboxStatsResponse{},
		},
		{
			runtimeapi.RuntimeService_ListPodSandboxStats_FullMethodName,
			&runtimeapi.ListPodSandboxStatsResponse{Stats: podStats(all...)},
			&runtimeapi.ListPodSandboxStatsResponse{Stats: podStats(seen...)},
		},
		{
			runtimeapi.RuntimeService_StreamPodSandboxStats_FullMethodName,
			&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: podStats(all...)},
			&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: podStats(seen...)},
		},
		{
			runtimeapi.RuntimeService_ListPodSandboxMetrics_FullMethodName,
			&runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: podMetrics(all...)},
			&runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: podMetrics(seen...)},
		},
		{
			runtimeapi.RuntimeService_StreamPodSandboxMetrics_FullMethodName,
			&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: podMetrics(all...)},
			&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: podMetrics(seen...)},
		},
	}
	for _, tc := range cases {
		t.Run(tc.method[strings.LastIndexByte(tc.method, '/')+1:], func(t *testing.T) {
			for _, active := range []bool{true, false} {
				b := newBed(t)
				want := tc.in
				if active {
					c := b.swapping()
					defer c.Release()
					want = tc.out
				}
				wire := marshal(t, withUnknown(proto.Clone(tc.in)))
				var got []byte
				if b.director.Stream(tc.method) != nil {
					_, f := b.stream(tc.method, &runtimeapi.StreamContainersRequest{})
					out, err := f.Message(wire)
					if err != nil || len(out) != 1 {
						t.Fatalf("got %d messages, %v", len(out), err)
					}
					got = out[0]
				} else {
					b.on(tc.method, always(withUnknown(proto.Clone(tc.in)), nil))
					var err error
					if got, err = b.raw(t.Context(), tc.method, nil); err != nil {
						t.Fatal(err)
					}
				}
				m := tc.in.ProtoReflect().New().Interface()
				if err := proto.Unmarshal(got, m); err != nil {
					t.Fatal(err)
				}
				if !proto.Equal(m, withUnknown(proto.Clone(want))) {
					t.Errorf("active %t: got  %v\nwant %v", active, m, want)
				}
			}
		})
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestContainerStats(t *testing.T) {
	for _, tc := range []struct {
		asked, full string
		code        codes.Code
	}{
		{incumbent, incumbent, codes.OK},
		{web, web, codes.OK},
		{successor, successor, codes.NotFound},
		{successor[:3], successor, codes.NotFound},
	} {
		t.Run(names[tc.full]+" as "+tc.asked, func(t *testing.T) {
			b := newBed(t)
			c := b.swapping()
			defer c.Release()
			const method = runtimeapi.RuntimeService_ContainerStats_FullMethodName
			b.on(method, always(withUnknown(&runtimeapi.ContainerStatsResponse{Stats: stats(tc.full)[0]}), nil))
			resp, err := call[runtimeapi.ContainerStatsResponse](
				t.Context(), b, method, &runtimeapi.ContainerStatsRequest{ContainerId: tc.asked},
			)
			wantCode(t, err, tc.code)
			if err == nil {
				wantUnknown(t, "response", resp)
			}
		})
	}
}

// Every message of the CRI that carries a container's ID in an answer must be known
// here: a new one in a later cri-api would leak hidden containers.
func TestAnswersThatCarryContainers(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	carriers := map[protoreflect.FullName]bool{
		"runtime.v1.Container": true, "runtime.v1.ContainerStatus": true, "runtime.v1.ContainerStats": true,
		"runtime.v1.ContainerMetrics": true, "runtime.v1.ContainerEventResponse": true,
	}
	var carries func(m protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) bool
	carries = func(m protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) bool {
		if carriers[m.FullName()] {
			return true
		}
		if seen[m.FullName()] {
			return false
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			if f := m.Fields().Get(i); f.Message() != nil && carries(f.Message(), seen) {
				return true
			}
		}
		return false
	}
	services := (&runtimeapi.Container{}).ProtoReflect().Descriptor().ParentFile().Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			m := services.Get(i).Methods().Get(j)
			if !carries(m.Output(), map[protoreflect.FullName]bool{}) {
				continue
			}
			name := "/" + string(services.Get(i).FullName()) + "/" + string(m.Name())
			taken := b.director.Unary(name) != nil
			if m.IsStreamingServer() {
				taken = b.director.Stream(name) != nil
			}
			if !taken {
				t.Errorf("%s answers with containers and is not intercepted", name)
			}
		}
	}
}
