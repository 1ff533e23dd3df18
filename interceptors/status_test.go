// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

const (
	methodStatus        = runtimeapi.RuntimeService_ContainerStatus_FullMethodName
	methodSandboxStatus = runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName
)

// exited is the status of a stopped container with every field that tells so.
func exited(id string) *runtimeapi.ContainerStatus {
	return &runtimeapi.ContainerStatus{
		Id: id, State: runtimeapi.ContainerState_CONTAINER_EXITED, CreatedAt: 1, StartedAt: 2, FinishedAt: 3,
		ExitCode: 137, Reason: "OOMKilled", Message: "killed", LogPath: "/l", ImageRef: "r", Labels: labels("app"),
	}
}

// running is what a masked one must look like.
func running(id string) *runtimeapi.ContainerStatus {
	s := exited(id)
	s.State, s.FinishedAt, s.ExitCode, s.Reason, s.Message = runtimeapi.ContainerState_CONTAINER_RUNNING, 0, 0, "", ""
	return s
}

func staged() *runtimeapi.ContainerStatus {
	return &runtimeapi.ContainerStatus{Id: successor,
		Annotations: map[string]string{view.StagedAnnotation: token}}
}

func TestContainerStatus(t *testing.T) {
	cases := []struct {
		name   string
		id     string
		real   *runtimeapi.ContainerStatus
		want   *runtimeapi.ContainerStatus // nil: not found
		settle bool                        // the operation ends before the call
	}{
		{name: "masked and stopped", id: incumbent, real: exited(incumbent), want: running(incumbent)},
		{name: "masked and running still", id: incumbent, real: running(incumbent), want: running(incumbent)},
		{name: "masked by prefix", id: incumbent[:4], real: exited(incumbent), want: running(incumbent)},
		{name: "hidden", id: successor, real: staged()},
		{name: "hidden by prefix", id: successor[:4], real: staged()},
		{name: "hidden by ID alone", id: successor, real: &runtimeapi.ContainerStatus{Id: successor}},
		{name: "another one", id: web, real: exited(web), want: exited(web)},
		{name: "masked before", id: incumbent, real: exited(incumbent), want: exited(incumbent), settle: true},
		{name: "hidden before", id: successor, real: staged(), want: staged(), settle: true},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			c := b.swapping()
			defer c.Release()
			if tc.settle {
				c.Reveal()
				b.serveList()
				b.serveStatus()
				b.readAll()
			}
			b.on(
				methodStatus,
				always(
					withUnknown(&runtimeapi.ContainerStatusResponse{Status: tc.real,
						Info: map[string]string{"info": "{}"}}), nil,
				),
			)
			resp, err := call[runtimeapi.ContainerStatusResponse](
				t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: tc.id, Verbose: true},
			)
			if tc.want == nil {
				// containerd's own words for an ID it does not know, with the ID as asked.
				want := `an error occurred when try to find container "` + tc.id + `": not found`
				if status.Code(err) != codes.NotFound || status.Convert(err).Message() != want {
					t.Errorf("got %v, want NotFound: %s", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(resp.GetStatus(), tc.want) {
				t.Errorf("got  %v\nwant %v", resp.GetStatus(), tc.want)
			}
			if resp.GetInfo()["info"] != "{}" {
				t.Error("info is lost")
			}
			wantUnknown(t, "response", resp)
		})
	}
	t.Run("the runtime's error", func(t *testing.T) {
		b := newBed(t)
		c := b.swapping()
		defer c.Release()
		b.on(methodStatus, always(nil, status.Error(codes.Unavailable, "gone")))
		_, err := call[runtimeapi.ContainerStatusResponse](
			t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: incumbent},
		)
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "gone") {
			t.Errorf("got %v, want the runtime's Unavailable", err)
		}
	})
}

// The start of a container that was held at a gate is corrected wherever it is told, as long as the
// container exists.
func TestStartedAtIsCorrected(t *testing.T) {
	b := newBed(t)
	at := time.Unix(2000, 7)
	raw := func() *runtimeapi.ContainerStatus {
		s := withUnknown(running(web))
		s.StartedAt = 1000
		return s
	}
	other := running(webBefore)
	other.StartedAt = 1000
	b.on(methodStatus, func(context.Context, []byte) (proto.Message, error) {
		return withUnknown(&runtimeapi.ContainerStatusResponse{Status: raw(), Info: map[string]string{"info": "{}"}}),
			nil
	})
	b.on(methodSandboxStatus, func(context.Context, []byte) (proto.Message, error) {
		return &runtimeapi.PodSandboxStatusResponse{ContainersStatuses: []*runtimeapi.ContainerStatus{raw(), other}},
			nil
	})
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	told := func() (status, sandbox, event int64) {
		t.Helper()
		one, err := call[runtimeapi.ContainerStatusResponse](
			t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: web},
		)
		if err != nil {
			t.Fatal(err)
		}
		wantUnknown(t, "status", one.GetStatus())
		if one.GetInfo()["info"] != "{}" {
			t.Error("info is lost")
		}
		all, err := call[runtimeapi.PodSandboxStatusResponse](
			t.Context(), b, methodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{},
		)
		if err != nil {
			t.Fatal(err)
		}
		if got := all.GetContainersStatuses()[1]; !proto.Equal(got, other) {
			t.Errorf("another container is told as %v", got)
		}
		msgs := through(
			t, f, &runtimeapi.ContainerEventResponse{ContainerId: web,
				ContainersStatuses: []*runtimeapi.ContainerStatus{raw()}},
		)
		return one.GetStatus().GetStartedAt(), all.GetContainersStatuses()[0].GetStartedAt(),
			msgs[0].GetContainersStatuses()[0].GetStartedAt()
	}
	check := func(when string, want int64) {
		t.Helper()
		if s, p, e := told(); s != want || p != want || e != want {
			t.Errorf("%s: status tells %d, sandbox %d, event %d, want %d", when, s, p, e, want)
		}
	}
	check("before", 1000)
	b.view.SetStarted(web, at)
	check("known", at.UnixNano())
	if b.view.Active() || b.director.Unary(methodList) != nil {
		t.Error("lists are taken for a start, which they do not tell")
	}
	c := b.swapping()
	check("during an operation", at.UnixNano())
	c.Release()
	b.view.SetStarted(web, at.Add(1)) // once more
	check("known better", at.UnixNano()+1)
	b.on(methodStatus, always(&runtimeapi.ContainerStatusResponse{Status: staged()}, nil))
	b.view.SetStarted(successor, at)
	resp, err := call[runtimeapi.ContainerStatusResponse](
		t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: successor},
	)
	if err != nil || resp.GetStatus().GetStartedAt() != 0 {
		t.Errorf("a container that has not been started is told as %v, %v", resp, err)
	}
	b.view.Forget(successor)
	b.view.Forget(successor)
	b.on(methodStatus, func(context.Context, []byte) (proto.Message, error) {
		return withUnknown(&runtimeapi.ContainerStatusResponse{Status: raw(), Info: map[string]string{"info": "{}"}}),
			nil
	})
	b.view.Forget(web)
	check("forgotten", 1000)
	b.view.Forget(incumbent)
	if b.director.Unary(methodStatus) != nil {
		t.Error("a status is taken though there is nothing to say")
	}
}

// A container whose probes are held is shown to begin in the future for as long as it runs, from
// its first showing on.
func TestHoldProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		is := running(successor)
		is.StartedAt = 1000
		b.on(methodStatus, func(context.Context, []byte) (proto.Message, error) {
			return &runtimeapi.ContainerStatusResponse{Status: proto.Clone(is).(*runtimeapi.ContainerStatus)}, nil
		})
		told := func() int64 {
			t.Helper()
			resp, err := call[runtimeapi.ContainerStatusResponse](
				t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: successor},
			)
			if status.Code(err) == codes.NotFound {
				return -1
			}
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetStatus().GetStartedAt()
		}
		c := b.swapping()
		b.view.SetStarted(successor, time.Unix(0, 2000))
		b.view.HoldProbes(successor, time.Minute)
		if got := told(); got != -1 {
			t.Errorf("hidden: %d", got)
		}
		time.Sleep(time.Second)
		c.Reveal()
		c.Release()
		time.Sleep(time.Second) // until kubelet looks
		until := time.Now().Add(time.Minute).UnixNano()
		for range 2 {
			if got := told(); got != until {
				t.Errorf("shown to begin at %d, want %d", got, until)
			}
			time.Sleep(2 * time.Minute) // and later, too
		}
		is = exited(successor)
		is.StartedAt = 1000
		if got := told(); got != 2000 {
			t.Errorf("exited: %d, want its real start", got)
		}
		b.view.Forget(successor)
		if got := told(); got != 1000 {
			t.Errorf("forgotten: %d", got)
		}
	})
}

func TestPodSandboxStatus(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	b.on(methodSandboxStatus, always(withUnknown(&runtimeapi.PodSandboxStatusResponse{
		Status:             &runtimeapi.PodSandboxStatus{Id: sandbox},
		ContainersStatuses: []*runtimeapi.ContainerStatus{staged(), withUnknown(exited(incumbent)), exited(web)},
		Timestamp:          7,
	}), nil))
	resp, err := call[runtimeapi.PodSandboxStatusResponse](
		t.Context(), b, methodSandboxStatus, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox},
	)
	if err != nil {
		t.Fatal(err)
	}
	want := withUnknown(&runtimeapi.PodSandboxStatusResponse{
		Status:             &runtimeapi.PodSandboxStatus{Id: sandbox},
		ContainersStatuses: []*runtimeapi.ContainerStatus{withUnknown(running(incumbent)), exited(web)},
		Timestamp:          7,
	})
	if !proto.Equal(resp, want) {
		t.Errorf("got  %v\nwant %v", resp, want)
	}
}
