// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package crinode_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// oneContainer is a runtime with one container. Each start and stop takes the next of errs; a start
// that fails leaves the container in the state that it is in.
type oneContainer struct {
	runtimeapi.RuntimeServiceClient
	errs     []error
	status   *runtimeapi.ContainerStatus // nil: not found
	info     string
	calls    int
	timeouts []int64 // of stops
}

func (f *oneContainer) next() error {
	f.calls++
	if len(f.errs) == 0 {
		return nil
	}
	err := f.errs[0]
	f.errs = f.errs[1:]
	return err
}

func (f *oneContainer) Version(
	context.Context, *runtimeapi.VersionRequest, ...grpc.CallOption,
) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{}, nil
}

func (f *oneContainer) StartContainer(
	context.Context, *runtimeapi.StartContainerRequest, ...grpc.CallOption,
) (*runtimeapi.StartContainerResponse, error) {
	return &runtimeapi.StartContainerResponse{}, f.next()
}

func (f *oneContainer) StopContainer(
	_ context.Context, r *runtimeapi.StopContainerRequest, _ ...grpc.CallOption,
) (*runtimeapi.StopContainerResponse, error) {
	f.timeouts = append(f.timeouts, r.GetTimeout())
	return &runtimeapi.StopContainerResponse{}, f.next()
}

func (f *oneContainer) ContainerStatus(
	context.Context, *runtimeapi.ContainerStatusRequest, ...grpc.CallOption,
) (*runtimeapi.ContainerStatusResponse, error) {
	if f.status == nil {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &runtimeapi.ContainerStatusResponse{Status: f.status, Info: map[string]string{"info": f.info}}, nil
}

func newClient(runtime runtimeapi.RuntimeServiceClient) *crinode.Client {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &crinode.Client{Runtime: runtime, Log: log}
}

var (
	errAway   = status.Error(codes.Unavailable, "connection refused")
	errBroken = status.Error(codes.Unknown, "no such luck")
)

// repeat returns n times err.
func repeat(err error, n int) (list []error) {
	for range n {
		list = append(list, err)
	}
	return list
}

func failsWith(err error, reason, says string) bool {
	var f *operation.Outcome
	return errors.As(err, &f) && f.Reason == reason && strings.Contains(f.Message, says)
}

// A container is started once, whatever a crash or a restart of the runtime has left.
func TestStartOnce(t *testing.T) {
	const created, running, exited = runtimeapi.ContainerState_CONTAINER_CREATED,
		runtimeapi.ContainerState_CONTAINER_RUNNING, runtimeapi.ContainerState_CONTAINER_EXITED
	for _, tt := range []struct {
		name   string
		errs   []error
		status *runtimeapi.ContainerStatus
		calls  int
		says   string // of the failure
	}{
		{name: "at once", calls: 1},
		{
			name: "the runtime restarts", errs: repeat(errAway, 3), calls: 4,
			status: &runtimeapi.ContainerStatus{State: created},
		},
		{
			name: "away for too long", errs: repeat(errAway, 100), status: &runtimeapi.ContainerStatus{State: created},
			calls: crinode.MaxTries, says: "starting the new container: connection refused",
		},
		{name: "runs already", errs: repeat(errBroken, 1), status: &runtimeapi.ContainerStatus{State: running},
			calls: 1},
		{
			name: "has run and ended", errs: repeat(errBroken, 1), calls: 1,
			status: &runtimeapi.ContainerStatus{State: exited, StartedAt: 1, Reason: "Completed"},
		},
		{
			name: "its start has failed", errs: repeat(errBroken, 1), calls: 1, says: "no such luck",
			status: &runtimeapi.ContainerStatus{State: exited, StartedAt: 1, Reason: "StartError"},
		},
		{
			name: "ended without a start", errs: repeat(errBroken, 1), calls: 1, says: "no such luck",
			status: &runtimeapi.ContainerStatus{State: exited},
		},
		{
			name: "cannot be started", errs: repeat(errBroken, 1), calls: 1, says: "no such luck",
			status: &runtimeapi.ContainerStatus{State: created},
		},
		{name: "gone", errs: repeat(errBroken, 1), calls: 1, says: "no such luck"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &oneContainer{errs: tt.errs, status: tt.status}
				err := newClient(f).StartOnce(t.Context(), "c")
				if (err == nil) != (tt.says == "") || err != nil && !failsWith(err, "StartFailed", tt.says) {
					t.Errorf("got %v, want %q", err, tt.says)
				}
				if f.calls != tt.calls {
					t.Errorf("%d calls, want %d", f.calls, tt.calls)
				}
			})
		})
	}
}

// A stop gets what is left of the grace period, the more often it is tried the less, but never less
// than kubelet's minimum.
func TestStop(t *testing.T) {
	for _, tt := range []struct {
		name  string
		errs  []error
		left  time.Duration
		first int64 // timeout
		calls int
		says  string
	}{
		{name: "at once", left: 30 * time.Second, first: 30, calls: 1},
		{name: "part of a second", left: 29*time.Second + time.Millisecond, first: 30, calls: 1},
		{name: "nothing left", first: 2, calls: 1},
		{name: "gone", left: time.Minute, errs: repeat(status.Error(codes.NotFound, ""), 1), first: 60, calls: 1},
		{name: "the runtime restarts", left: 30 * time.Second, errs: repeat(errAway, 3), first: 30, calls: 4},
		{
			name: "away for too long", left: time.Second, errs: repeat(errAway, 100), first: 2,
			calls: crinode.MaxTries, says: "stopping the container: connection refused",
		},
		{name: "refused", left: time.Minute, errs: repeat(errBroken, 1), first: 60, calls: 1, says: "no such luck"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &oneContainer{errs: tt.errs}
				err := newClient(f).Stop(t.Context(), "c", time.Now().Add(tt.left))
				if (err == nil) != (tt.says == "") || err != nil && !failsWith(err, "StopFailed", tt.says) {
					t.Errorf("got %v, want %q", err, tt.says)
				}
				if f.calls != tt.calls || f.timeouts[0] != tt.first {
					t.Errorf("%d calls, timeouts %v, want %d and %d first", f.calls, f.timeouts, tt.calls, tt.first)
				}
				for _, timeout := range f.timeouts {
					if timeout < 2 || timeout > tt.first {
						t.Errorf("timeouts %v", f.timeouts)
					}
				}
			})
		})
	}
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &oneContainer{errs: repeat(errAway, 3)}
		if err := newClient(f).Retry(t.Context(), f.next); err != nil || f.calls != 4 {
			t.Errorf("got %v after %d reads", err, f.calls)
		}
		f = &oneContainer{errs: repeat(errBroken, 3)}
		if err := newClient(f).Retry(t.Context(), f.next); !errors.Is(err, errBroken) || f.calls != 1 {
			t.Errorf("got %v after %d reads", err, f.calls)
		}
		f = &oneContainer{errs: repeat(errAway, 100)}
		began := time.Now()
		if err := newClient(f).Retry(t.Context(), f.next); !errors.Is(err, errAway) || f.calls != crinode.MaxTries {
			t.Errorf("got %v after %d reads", err, f.calls)
		}
		if took := time.Since(began); took < 15*time.Second || took > 30*time.Second {
			t.Errorf("given up after %s", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f = &oneContainer{errs: repeat(errAway, 100)}
		if err := newClient(f).Retry(ctx, f.next); !errors.Is(err, context.Canceled) || f.calls != 1 {
			t.Errorf("got %v after %d reads", err, f.calls)
		}
	})
}

func TestInspect(t *testing.T) {
	for info, want := range map[string]crinode.Info{
		`{"pid":7,"runtimeType":"io.containerd.runc.v2"}`: {PID: 7, RuntimeType: crinode.RuncType},
		`{}`: {}, `no JSON`: {}, ``: {},
	} {
		f := &oneContainer{status: &runtimeapi.ContainerStatus{Id: "c"}, info: info}
		st, got, err := newClient(f).Inspect(t.Context(), "c")
		if err != nil || st.GetId() != "c" || got != want {
			t.Errorf("%s: got %v, %+v, %v", info, st, got, err)
		}
	}
	if _, _, err := newClient(&oneContainer{}).Inspect(t.Context(), "c"); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
}

func TestFindStaged(t *testing.T) {
	f := newFake()
	f.containers[0].Annotations = map[string]string{view.StagedAnnotation: "token"}
	for token, want := range map[string]string{"token": "a1", "other": ""} {
		if got, err := newClient(f).FindStaged(t.Context(), "new", token); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", token, got, err, want)
		}
	}
	if got, err := newClient(f).FindStaged(t.Context(), "old", "token"); err != nil || got != "" {
		t.Errorf("in another sandbox: got %q, %v", got, err)
	}
}

// deadlines notes the time that each call has.
type deadlines struct {
	grpc.ClientConnInterface
	left time.Duration // 0: no deadline
}

func (d *deadlines) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	d.left = 0
	if by, ok := ctx.Deadline(); ok {
		d.left = time.Until(by)
	}
	return nil
}

// A call without a deadline gets one, except a hook's command.
func TestBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deadlines{}
		rt := runtimeapi.NewRuntimeServiceClient(crinode.Bound(d))
		if _, err := rt.Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil ||
			d.left != crinode.CallTimeout {
			t.Errorf("a call has %s, %v", d.left, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := rt.Version(ctx, &runtimeapi.VersionRequest{}); err != nil || d.left != time.Hour {
			t.Errorf("a call with an hour has %s, %v", d.left, err)
		}
		if _, err := rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{}); err != nil || d.left != 0 {
			t.Errorf("a command has %s, %v", d.left, err)
		}
	})
}
