// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"errors"
	"fmt"
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

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// driver is an operation that lets kubelet drive.
type driver struct {
	stop   func(ctx context.Context, grace int64) (bool, error)
	create func(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool)
}

var _ view.Driver = driver{}

func (d driver) Stop(ctx context.Context, grace int64) (bool, error) { return d.stop(ctx, grace) }

func (d driver) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	return d.create(ctx, req)
}

func createRequest() *runtimeapi.CreateContainerRequest {
	return &runtimeapi.CreateContainerRequest{
		PodSandboxId: sandbox, Config: &runtimeapi.ContainerConfig{Labels: labels("app")},
	}
}

func (b *bed) creates(ctx context.Context) (string, error) {
	resp, err := call[runtimeapi.CreateContainerResponse](ctx, b, methodCreate, createRequest())
	return resp.GetContainerId(), err
}

func (b *bed) stops(ctx context.Context, id string, grace int64) error {
	_, err := call[runtimeapi.StopContainerResponse](
		ctx, b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace},
	)
	return err
}

// gives makes the runtime answer stops and creations.
func (b *bed) gives() *bed {
	b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
	b.on(methodCreate, always(&runtimeapi.CreateContainerResponse{ContainerId: "dddd000044"}, nil))
	return b
}

func TestStopIsDriven(t *testing.T) {
	t.Run("taken over", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		c.Drive(driver{stop: func(_ context.Context, grace int64) (bool, error) {
			if grace != 17 {
				t.Errorf("the grace is %d", grace)
			}
			if !c.TryReveal() {
				t.Error("taken back")
			}
			return true, nil
		}})
		if err := b.stops(t.Context(), incumbent, 17); err != nil {
			t.Error(err)
		}
		if got := b.called(); got != "" {
			t.Errorf("the runtime was called: %s", got)
		}
		if y := c.YieldedTo(); y != nil {
			t.Errorf("taken back by %v", y)
		}
		c.Release()
	})
	t.Run("not stopped", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		defer c.Release()
		c.Drive(
			driver{
				stop: func(context.Context, int64) (bool, error) {
					return true,
						status.Error(codes.DeadlineExceeded, "later")
				},
			},
		)
		wantCode(t, b.stops(t.Context(), incumbent, 17), codes.DeadlineExceeded)
		if got := b.called(); got != "" {
			t.Errorf("the runtime was called: %s", got)
		}
		if y := c.YieldedTo(); y != nil {
			t.Errorf("taken back by %v", y)
		}
	})
	t.Run("yields", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		c.Drive(driver{stop: func(context.Context, int64) (bool, error) { return false, nil }})
		go func() { // the operation
			<-c.Yielded()
			c.Release()
		}()
		if err := b.stops(t.Context(), incumbent, 17); err != nil {
			t.Error(err)
		}
		if got := b.called(); got != "StopContainer" {
			t.Errorf("the runtime was called: %s", got)
		}
		if y := c.YieldedTo(); y == nil || y.Grace != 17 {
			t.Errorf("taken back by %v", y)
		}
	})
	t.Run("the hidden one is nobody's to stop", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		defer c.Release()
		c.Drive(driver{stop: func(context.Context, int64) (bool, error) { return false, errors.New("asked") }})
		if err := b.stops(t.Context(), successor, 17); err != nil {
			t.Error(err)
		}
		if y := c.YieldedTo(); y != nil || b.called() != "" {
			t.Errorf("taken back by %v, the runtime was called: %s", y, b.called())
		}
	})
}

func TestCreateIsDriven(t *testing.T) {
	t.Run("answered with what is there", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		defer c.Release()
		c.Drive(driver{create: func(_ context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
			if req.GetPodSandboxId() != sandbox {
				t.Errorf("asked with %v", req)
			}
			return successor, true
		}})
		if id, err := b.creates(t.Context()); id != successor || err != nil {
			t.Errorf("got %q, %v", id, err)
		}
		if got := b.called(); got != "" {
			t.Errorf("the runtime was called: %s", got)
		}
		if got := b.records.String(); got != "" {
			t.Errorf("recorded: %s", got)
		}
	})
	t.Run("ended", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		c.Drive(driver{create: func(context.Context, *runtimeapi.CreateContainerRequest) (string, bool) {
			c.Release()
			return "", true
		}})
		if id, err := b.creates(t.Context()); id != "dddd000044" || err != nil {
			t.Errorf("got %q, %v", id, err)
		}
		if y := c.YieldedTo(); y != nil {
			t.Errorf("taken back by %v", y)
		}
	})
	t.Run("yields", func(t *testing.T) {
		b := newBed(t).gives()
		c := b.swapping()
		c.Drive(driver{create: func(context.Context, *runtimeapi.CreateContainerRequest) (string,
			bool) {
			return "", false
		}})
		go func() { // the operation
			<-c.Yielded()
			c.Discard()
			c.Release()
		}()
		if id, err := b.creates(t.Context()); id != "dddd000044" || err != nil {
			t.Errorf("got %q, %v", id, err)
		}
	})
}

// Calls that come before the operation of an earlier process goes on wait for it, but not longer
// than their callers.
func TestCallsWaitForTheDriver(t *testing.T) {
	const soon = 10 * time.Second
	inBubble := func(name string, f func(t *testing.T, b *bed, c *view.Claim)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t).gives()
				c := b.swapping()
				defer c.Release()
				c.WillDrive()
				f(t, b, c)
			})
		})
	}
	inBubble("which comes", func(t *testing.T, b *bed, c *view.Claim) {
		go func() {
			time.Sleep(soon)
			c.Drive(driver{stop: func(context.Context, int64) (bool, error) { return true, nil }})
			c.Drive(driver{}) // once is enough
		}()
		began := time.Now()
		if err := b.stops(t.Context(), incumbent, 30); err != nil || time.Since(began) != soon {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
	inBubble("which ends before", func(t *testing.T, b *bed, c *view.Claim) {
		go func() {
			time.Sleep(soon)
			c.Release()
		}()
		began := time.Now()
		err := b.stops(t.Context(), incumbent, 30)
		if err != nil || time.Since(began) != soon || b.called() != "StopContainer" {
			t.Errorf("%v after %s, the runtime was called: %s", err, time.Since(began), b.called())
		}
		if id, err := b.creates(t.Context()); id != "dddd000044" || err != nil {
			t.Errorf("got %q, %v", id, err)
		}
	})
	inBubble("which does not come", func(t *testing.T, b *bed, c *view.Claim) {
		for _, call := range []func(ctx context.Context) error{
			func(ctx context.Context) error { _, err := b.creates(ctx); return err },
			func(ctx context.Context) error { return b.stops(ctx, incumbent, 30) },
		} {
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			began := time.Now()
			_ = call(ctx) // what becomes of it is nobody's to know
			cancel()
			if took := time.Since(began); took > soon {
				t.Errorf("the caller has waited %s", took)
			}
		}
	})
}

// A pod may go away after a stop that a successor has answered: then the successor is asked to stop
// before its sandbox is, unless kubelet has taken it over, which then stops it by itself.
func TestLateSuccessorOfADrivenStop(t *testing.T) {
	for _, adopted := range []bool{false, true} {
		stopped := &stops{}
		b := newBed(t).gives()
		log := logrus.New()
		log.SetOutput(io.Discard)
		b.director = interceptors.New(interceptors.Options{View: b.view, Records: b.records, Log: log,
			Runtime: stopped})
		b.on(methodStopSandbox, always(&runtimeapi.StopPodSandboxResponse{}, nil))
		c := b.swapping()
		c.Drive(driver{
			stop:   func(context.Context, int64) (bool, error) { return c.TryReveal(), nil },
			create: func(context.Context, *runtimeapi.CreateContainerRequest) (string, bool) { return successor, true },
		})
		if err := b.stops(t.Context(), incumbent, 17); err != nil {
			t.Error(err)
		}
		if adopted {
			if id, err := b.creates(t.Context()); id != successor || err != nil {
				t.Errorf("got %q, %v", id, err)
			}
		}
		c.Release()
		_, err := call[runtimeapi.StopPodSandboxResponse](
			t.Context(), b, methodStopSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox},
		)
		if err != nil {
			t.Error(err)
		}
		want := successor + " 17s"
		if adopted {
			want = ""
		}
		if got := strings.Join(stopped.calls, " "); got != want {
			t.Errorf("adopted %v: stopped %q, want %q", adopted, got, want)
		}
	}
}

// stops is a connection to a runtime on which containers are only stopped.
type stops struct{ calls []string }

func (s *stops) Invoke(_ context.Context, method string, args, _ any, _ ...grpc.CallOption) error {
	req, ok := args.(*runtimeapi.StopContainerRequest)
	if !ok {
		return status.Error(codes.Unimplemented, method)
	}
	s.calls = append(s.calls, fmt.Sprintf("%s %ds", req.GetContainerId(), req.GetTimeout()))
	return nil
}

func (*stops) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "no streams here")
}
