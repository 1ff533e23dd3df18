// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	failpoints "github.com/cri-proxy/cri-proxy/ops/failpoint"
)

// This package's own names for what is in crinode and failpoint.

// Method is one of the methods of api/ops/v1.
type Method = string

func sleep(ctx context.Context, d time.Duration) error { return crinode.Sleep(ctx, d) }

func failpoint(name string) { failpoints.Reach(name) }

// toOutcome returns err, as an outcome if it is a failure that crinode has found.
func toOutcome(err error) error {
	var f *crinode.Failure
	if errors.As(err, &f) {
		return failf(f.Reason, "%s", f.Message)
	}
	return err
}

// sandboxOf returns the pod's running sandbox; an outcome if there is none.
func (e *Engine) sandboxOf(ctx context.Context, pod *opsv1.PodRef) (*runtimeapi.PodSandbox, error) {
	sandbox, err := e.node.Sandbox(ctx, pod)
	return sandbox, toOutcome(err)
}

// resolve finds the running container and checks the preconditions. It returns an outcome for what
// the caller got wrong, and other errors for the runtime's.
func (e *Engine) resolve(
	ctx context.Context, pod *opsv1.PodRef, want *opsv1.ContainerRestart, force bool,
) (*crinode.Target, error) {
	target, err := e.node.Resolve(ctx, pod, want, force)
	return target, toOutcome(err)
}

// requestOf returns the request that made the container: as recorded, or, for one that is older
// than the proxy, put together from the runtime's verbose status.
func (e *Engine) requestOf(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, error) {
	if req := e.records.request(id); req != nil {
		return req, nil
	}
	return e.node.ReadRequest(ctx, id, sandbox)
}
