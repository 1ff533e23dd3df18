// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package crinode

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// LateCreate is how long after its call was cut off, or after the end of the process that made the
// call, a CreateContainer may still bring a container about. The runtime takes milliseconds for it,
// seconds under load.
const LateCreate = 15 * time.Second

// AwaitRuntime returns when the runtime answers, or ctx ends.
func (c *Client) AwaitRuntime(ctx context.Context) error {
	wait := 20 * time.Millisecond
	for {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := c.Runtime.Version(call, &runtimeapi.VersionRequest{})
		cancel()
		if err == nil {
			return nil
		}
		if err := Sleep(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, time.Second)
	}
}

// Retry calls read again while the runtime is away: a runtime that restarts is no reason to give
// an operation up.
func (c *Client) Retry(ctx context.Context, read func() error) error {
	for try := 1; ; try++ {
		err := read()
		if status.Code(err) != codes.Unavailable || try == MaxTries {
			return err
		}
		if err := c.AwaitReturn(ctx, try); err != nil {
			return err
		}
	}
}

// AwaitReturn waits, after a call that the runtime did not answer, until the runtime answers again.
// It waits longer with each try, because a runtime that does answer may lack the container's shim.
func (c *Client) AwaitReturn(ctx context.Context, try int) error {
	if err := c.AwaitRuntime(ctx); err != nil {
		return err
	}
	return Sleep(ctx, min(10*time.Millisecond<<try, 5*time.Second))
}

// Sleep returns nil after d, or ctx's error when ctx ends before.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// EndWith returns a context that ends with ctx or when c is closed. The caller must call end.
func EndWith(ctx context.Context, c <-chan struct{}) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with ctx
		select {
		case <-c:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}
