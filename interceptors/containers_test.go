// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

const (
	methodCreate        = runtimeapi.RuntimeService_CreateContainer_FullMethodName
	methodStart         = runtimeapi.RuntimeService_StartContainer_FullMethodName
	methodStop          = runtimeapi.RuntimeService_StopContainer_FullMethodName
	methodRemove        = runtimeapi.RuntimeService_RemoveContainer_FullMethodName
	methodUpdate        = runtimeapi.RuntimeService_UpdateContainerResources_FullMethodName
	methodStopSandbox   = runtimeapi.RuntimeService_StopPodSandbox_FullMethodName
	methodRemoveSandbox = runtimeapi.RuntimeService_RemovePodSandbox_FullMethodName
)

// later makes a call on its own goroutine.
func later(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func (b *bed) create(ctx context.Context) error {
	_, err := call[runtimeapi.CreateContainerResponse](ctx, b, methodCreate, &runtimeapi.CreateContainerRequest{
		PodSandboxId: sandbox, Config: &runtimeapi.ContainerConfig{
			Labels: labels("app"), Envs: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff, 0xfe}}},
		},
	})
	return err
}

func pending(t *testing.T, what string, done <-chan error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-done:
		t.Errorf("%s is answered already: %v", what, err)
	default:
	}
}

func TestCreateContainerIsRecorded(t *testing.T) {
	t.Run("recorded as sent", func(t *testing.T) {
		b := newBed(t)
		b.on(methodCreate, always(&runtimeapi.CreateContainerResponse{ContainerId: "made"}, nil))
		if err := b.create(t.Context()); err != nil {
			t.Fatal(err)
		}
		size := proto.Size(&runtimeapi.CreateContainerRequest{
			PodSandboxId: sandbox, Config: &runtimeapi.ContainerConfig{
				Labels: labels("app"), Envs: []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff, 0xfe}}},
			},
		})
		if got, want := b.records.String(), fmt.Sprintf("created made %d bytes", size); got != want {
			t.Errorf("records: %s, want %s", got, want)
		}
		if b.view.Claimed(slot) {
			t.Error("the slot stays claimed")
		}
	})
	t.Run("refused by the runtime", func(t *testing.T) {
		b := newBed(t)
		b.on(methodCreate, always(nil, status.Error(codes.FailedPrecondition, "name is reserved")))
		wantCode(t, b.create(t.Context()), codes.FailedPrecondition)
		if got := b.records.String(); got != "" {
			t.Errorf("records: %s", got)
		}
		if b.view.Claimed(slot) {
			t.Error("the slot stays claimed")
		}
	})
	t.Run("without labels", func(t *testing.T) { // crictl's
		b := newBed(t)
		b.on(methodCreate, always(&runtimeapi.CreateContainerResponse{ContainerId: "made"}, nil))
		if _, err := b.raw(t.Context(), methodCreate, nil); err != nil {
			t.Fatal(err)
		}
		if got := b.records.String(); got != "created made 0 bytes" {
			t.Errorf("records: %s", got)
		}
	})
}

func TestCreateContainerWaitsForTheOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		b.on(methodCreate, always(&runtimeapi.CreateContainerResponse{ContainerId: "made"}, nil))
		c := b.swapping()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		impatient := later(func() error { return b.create(ctx) })
		pending(t, "create", impatient)
		patient := later(func() error { return b.create(t.Context()) })
		pending(t, "create", patient)
		wantCode(t, <-impatient, codes.DeadlineExceeded)
		c.Release()
		if err := <-patient; err != nil {
			t.Error(err)
		}
		if got := b.called(); got != "CreateContainer" {
			t.Errorf("the runtime saw %s", got)
		}
	})
}

// The runtime's answer to a call on the successor must be that for an unknown container.
func TestCallsOnAHiddenContainer(t *testing.T) {
	for _, id := range []string{successor, successor[:5]} {
		cases := []struct {
			name string
			do   func(context.Context, *bed) error
			code codes.Code
		}{
			{"StartContainer", func(ctx context.Context, b *bed) error {
				_, err := call[runtimeapi.StartContainerResponse](
					ctx, b, methodStart, &runtimeapi.StartContainerRequest{ContainerId: id},
				)
				return err
			}, codes.NotFound},
			{"StopContainer", func(ctx context.Context, b *bed) error {
				_, err := call[runtimeapi.StopContainerResponse](
					ctx, b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: id},
				)
				return err
			}, codes.OK},
			{"RemoveContainer", func(ctx context.Context, b *bed) error {
				_, err := call[runtimeapi.RemoveContainerResponse](
					ctx, b, methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: id},
				)
				return err
			}, codes.OK},
		}
		for _, tc := range cases {
			t.Run(tc.name+" "+id, func(t *testing.T) {
				b := newBed(t)
				c := b.swapping()
				defer c.Release()
				wantCode(t, tc.do(t.Context(), b), tc.code)
				if got := b.called(); got != "" {
					t.Errorf("the runtime saw %s", got)
				}
				if c.YieldedTo() != nil {
					t.Error("the operation yields to a call that cannot be meant")
				}
			})
		}
	}
}

// Once revealed, a successor is a container like any other, even before the slot is released.
func TestCallsOnARevealedContainerPass(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	c.Reveal()
	b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
	if _, err := call[runtimeapi.StopContainerResponse](
		t.Context(), b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: successor},
	); err != nil {
		t.Fatal(err)
	}
	if got := b.called(); got != "StopContainer" {
		t.Errorf("the runtime saw %q", got)
	}
}

// Whoever takes the slot back makes the operation yield, and is answered when it has.
func TestTakingBack(t *testing.T) {
	cases := []struct {
		name   string
		method string
		req    proto.Message
		resp   proto.Message
		grace  int64
		// first is whether the runtime is asked before the operation has given way.
		first bool
	}{
		{
			"StopContainer", methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7},
			&runtimeapi.StopContainerResponse{}, 7, true,
		},
		{
			"StopContainer by prefix", methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent[:4]},
			&runtimeapi.StopContainerResponse{}, 0, true,
		},
		{
			"StopPodSandbox", methodStopSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox},
			&runtimeapi.StopPodSandboxResponse{}, 2, false,
		},
		{
			"StopPodSandbox by prefix", methodStopSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox[:3]},
			&runtimeapi.StopPodSandboxResponse{}, 2, false,
		},
		{
			"RemovePodSandbox", methodRemoveSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox},
			&runtimeapi.RemovePodSandboxResponse{}, 2, false,
		},
		{
			"RemoveContainer", methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: incumbent},
			&runtimeapi.RemoveContainerResponse{}, 2, false,
		},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				b.on(tc.method, always(tc.resp, nil))
				c := b.swapping()
				defer c.Release()
				for round := range 2 { // a repeated call changes nothing
					done := later(func() error {
						_, err := b.raw(t.Context(), tc.method, marshal(t, tc.req))
						return err
					})
					pending(t, tc.name, done)
					if (b.called() != "") != tc.first {
						t.Errorf("the runtime has seen %q", b.called())
					}
					<-c.Yielded()
					y := c.YieldedTo()
					if y.Method != tc.method || y.Grace != tc.grace {
						t.Errorf("yielded to %+v", *y)
					}
					if round == 1 {
						c.Release()
					}
					if err := <-done; err != nil { // in round 0 after its timeout: Stop* and Remove* never fail for us
						t.Error(err)
					}
					b.mu.Lock()
					n := len(b.calls)
					b.calls = nil
					b.mu.Unlock()
					if n != 1 {
						t.Errorf("the runtime was asked %d times", n)
					}
				}
			})
		})
	}
}

func TestStopOfTheRuntimeFails(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	b.on(methodStop, always(nil, status.Error(codes.Unavailable, "gone")))
	_, err := call[runtimeapi.StopContainerResponse](
		t.Context(), b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent},
	)
	wantCode(t, err, codes.Unavailable) // at once: kubelet tries again
	if c.YieldedTo() == nil {
		t.Error("the operation does not yield")
	}
}

// A stop that came before the operation knew its container is seen by Stopping.
func TestStopsUnderWayAreSeen(t *testing.T) {
	for _, tc := range []struct {
		method string
		req    proto.Message
		want   bool
	}{
		{methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent}, true},
		{methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent[:6]}, true},
		{methodStop, &runtimeapi.StopContainerRequest{ContainerId: web}, false},
		{methodStop, &runtimeapi.StopContainerRequest{}, false},
		{methodStopSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox}, true},
		{methodStopSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "x"}, false},
		{methodRemoveSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox}, true},
		{methodRemoveSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "x"}, false},
		{methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: incumbent}, true},
		{methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: web}, false},
	} {
		t.Run(tc.method[strings.LastIndexByte(tc.method, '/')+1:], func(t *testing.T) {
			b := newBed(t)
			arrived, gate := make(chan struct{}), make(chan struct{})
			b.on(tc.method, func(context.Context, []byte) (proto.Message, error) {
				close(arrived)
				<-gate
				return &runtimeapi.StopContainerResponse{}, nil
			})
			done := later(func() error {
				_, err := b.raw(t.Context(), tc.method, marshal(t, tc.req))
				return err
			})
			<-arrived
			c := b.claimed()
			defer c.Release()
			if got := c.Stopping(); got != tc.want {
				t.Errorf("stopping is %t during the call", got)
			}
			close(gate)
			if err := <-done; err != nil {
				t.Error(err)
			}
			if c.Stopping() {
				t.Error("stopping after the call")
			}
		})
	}
}

func TestRemoveContainer(t *testing.T) {
	t.Run("forgets", func(t *testing.T) {
		b := newBed(t)
		b.on(methodRemove, always(&runtimeapi.RemoveContainerResponse{}, nil))
		if _, err := call[runtimeapi.RemoveContainerResponse](
			t.Context(), b, methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: web},
		); err != nil {
			t.Fatal(err)
		}
		if got := b.records.String(); got != "removed "+web {
			t.Errorf("records: %s", got)
		}
	})
	t.Run("not if it fails", func(t *testing.T) {
		b := newBed(t)
		b.on(methodRemove, always(nil, status.Error(codes.Unknown, "starting")))
		_, err := call[runtimeapi.RemoveContainerResponse](
			t.Context(), b, methodRemove, &runtimeapi.RemoveContainerRequest{ContainerId: web},
		)
		wantCode(t, err, codes.Unknown)
		if got := b.records.String(); got != "" {
			t.Errorf("records: %s", got)
		}
	})
}

func TestUpdateContainerResources(t *testing.T) {
	cpus := &runtimeapi.LinuxContainerResources{CpusetCpus: "3"}
	cases := []struct {
		name    string
		id      string
		linux   *runtimeapi.LinuxContainerResources
		staged  bool
		masked  bool
		reveals bool   // in the middle of the incumbent's update
		fail    string // the containers whose updates fail
		code    codes.Code
		updates string // what the runtime saw
		records string
	}{
		{name: "at rest", id: web, linux: cpus, updates: "web=3", records: "updated " + web + " cpus=3"},
		{name: "no Linux part", id: web, updates: "web="},
		{name: "refused", id: web, linux: cpus, fail: web, code: codes.Unknown, updates: "web=3"},
		{
			name: "incumbent, before the stage", id: incumbent, linux: cpus, updates: "old=3",
			records: "updated " + incumbent + " cpus=3",
		},
		{
			name: "incumbent, staged", id: incumbent, linux: cpus, staged: true, updates: "old=3 new=3",
			records: "updated " + incumbent + " cpus=3, updated " + successor + " cpus=3",
		},
		{
			name: "by prefix", id: incumbent[:4], linux: cpus, staged: true, updates: "old=3 new=3",
			records: "updated " + incumbent + " cpus=3, updated " + successor + " cpus=3",
		},
		// Kubelet asked for the incumbent only: what the successor says is ours.
		{
			name: "successor refuses", id: incumbent, linux: cpus, staged: true, fail: successor,
			updates: "old=3 new=3",
			records: "updated " + incumbent + " cpus=3, updated " + successor + " cpus=3",
		},
		{
			name: "incumbent refuses", id: incumbent, linux: cpus, staged: true, fail: incumbent, code: codes.Unknown,
			updates: "old=3",
		},
		// The runtime's word on a process that is going says nothing about what kubelet will see.
		{
			name: "incumbent is going", id: incumbent, linux: cpus, staged: true, masked: true, fail: incumbent,
			updates: "old=3 new=3", records: "updated " + incumbent + " cpus=3, updated " + successor + " cpus=3",
		},
		{
			name: "incumbent is going, and gone", id: incumbent, linux: cpus, staged: true, masked: true, reveals: true,
			fail: incumbent, updates: "old=3 new=3",
			records: "updated " + incumbent + " cpus=3, updated " + successor + " cpus=3",
		},
		{
			name: "incumbent is going, both refuse", id: incumbent, linux: cpus, staged: true, masked: true,
			fail: incumbent + successor, code: codes.Unknown, updates: "old=3 new=3",
		},
		{
			name: "incumbent is going, no Linux part", id: incumbent, staged: true, masked: true, fail: incumbent,
			code: codes.Unknown, updates: "old=",
		},
		{
			name: "incumbent is going, nothing is staged", id: incumbent, linux: cpus, masked: true, fail: incumbent,
			code: codes.Unknown, updates: "old=3",
		},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			c := b.claimed()
			defer c.Release()
			if tc.staged {
				c.HideNow(token)
				c.Staged(successor)
			}
			if tc.masked {
				c.HideNow(token)
				c.Mask()
			}
			var seen []string
			b.on(methodUpdate, func(_ context.Context, raw []byte) (proto.Message, error) {
				req := &runtimeapi.UpdateContainerResourcesRequest{}
				if err := proto.Unmarshal(raw, req); err != nil {
					return nil, err
				}
				id := req.GetContainerId()
				for full := range names {
					if full != "" && strings.HasPrefix(full, id) {
						id = full
					}
				}
				seen = append(seen, names[id]+"="+req.GetLinux().GetCpusetCpus())
				if tc.reveals && id == incumbent {
					c.Reveal()
				}
				if strings.Contains(tc.fail, id) {
					return nil, status.Error(codes.Unknown, "no")
				}
				wantUnknown(t, "request", req)
				return withUnknown(&runtimeapi.UpdateContainerResourcesResponse{}), nil
			})
			resp, err := call[runtimeapi.UpdateContainerResourcesResponse](t.Context(), b, methodUpdate,
				withUnknown(&runtimeapi.UpdateContainerResourcesRequest{ContainerId: tc.id, Linux: tc.linux}))
			wantCode(t, err, tc.code)
			if err == nil {
				wantUnknown(t, "response", resp)
			}
			if got := strings.Join(seen, " "); got != tc.updates {
				t.Errorf("the runtime saw %q, want %q", got, tc.updates)
			}
			if got := b.records.String(); got != tc.records {
				t.Errorf("records: %q, want %q", got, tc.records)
			}
		})
	}
}

var _ interceptors.Records = (*recorder)(nil)
