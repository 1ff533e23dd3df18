// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// Incumbent is the container that the operation replaces.
type Incumbent struct {
	c       *Container
	Status  *runtimeapi.ContainerStatus
	Request *runtimeapi.CreateContainerRequest
	// applied is what the resources in request have become, with all that has been recorded up to
	// recorded.
	applied, recorded *runtimeapi.LinuxContainerResources
	Exit              *switchover.Exit // nil where there is none
}

// exitTimeout is how long a runtime that has answered a stop may take to show the container
// exited; kubelet may wait for that.
const exitTimeout = 15 * time.Second

// Watch finds out whether the incumbent runs and watches its process where that says
// something.
func (i *Incumbent) Watch(ctx context.Context) (running bool, err error) {
	rec := i.c.Record()
	if i.Exit != nil {
		return !i.Exit.Over(), nil
	}
	st, info, err := i.inspect(ctx)
	if err != nil {
		return false, err
	}
	if st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return false, nil
	}
	if info.PID > 0 && i.ownPIDs() && i.c.Node.Switchover.Maybe(opsv1.MethodPidfd) {
		if i.Exit, err = i.c.Node.Switchover.Watch(info.PID, rec.Incumbent); err != nil {
			i.c.Log.WithError(err).Warn("process not watched")
			if rec.Method == opsv1.MethodPidfd {
				i.c.SetMethod(opsv1.MethodPlain)
			}
		}
	}
	return true, nil
}

// StoppedByItself is the outcome of a restart whose container is gone already.
func (i *Incumbent) StoppedByItself(ctx context.Context) error {
	code := int32(0)
	if st, _, err := i.c.Node.Inspect(ctx, i.c.Record().Incumbent); err == nil {
		code = st.GetExitCode()
	}
	return operation.Failf(opsv1.ReasonContainerNotRunning, "container %q stopped by itself (exit code %d) before the "+
		"restart began; kubelet handles it", i.c.Spec.GetName(), code)
}

// Grace is what preStop and stop may take together, before the floor for the stop.
func (i *Incumbent) Grace() time.Duration {
	if i.c.Spec.GracePeriodSeconds != nil {
		return time.Duration(i.c.Spec.GetGracePeriodSeconds()) * time.Second
	}
	for _, a := range []map[string]string{i.Status.GetAnnotations(), i.Request.GetConfig().GetAnnotations()} {
		if s, err := strconv.ParseInt(a[criclone.AnnotationTerminationGrace], 10, 32); err == nil && s >= 0 {
			return time.Duration(s) * time.Second
		}
	}
	return crinode.DefaultGrace
}

// inspect is inspect of the incumbent, which waits for a runtime that is away.
func (i *Incumbent) inspect(ctx context.Context) (st *runtimeapi.ContainerStatus, info crinode.Info, err error) {
	id := i.c.Record().Incumbent
	err = i.c.Node.Retry(ctx, func() (err error) {
		st, info, err = i.c.Node.Inspect(ctx, id)
		return err
	})
	if err != nil {
		return nil, info, operation.Failf(opsv1.ReasonRuntimeError, "reading container %s: %v", id,
			status.Convert(err).Message())
	}
	return st, info, nil
}

// awaitExited waits until the runtime knows what the kernel does: that the incumbent's process is
// gone. Until then both would be shown running. stopErr is why it does not know yet. Without one it
// may be late as well: containerd answers a stop at once when the process had ended before, and it
// is still clearing that away (internal/cri/server/container_stop.go).
func (i *Incumbent) awaitExited(ctx context.Context, stopErr error) error {
	limit := exitTimeout
	if stopErr != nil {
		limit = crinode.CallTimeout // it may be restarting
		i.c.Log.WithError(stopErr).Warn("the container's process has ended, but the runtime did not say so")
	}
	deadline, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	waiting, end := crinode.EndWith(deadline, i.c.Claim.Yielded())
	defer end()
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		st, err := i.c.Node.Runtime.ContainerStatus(deadline,
			&runtimeapi.ContainerStatusRequest{ContainerId: i.c.Record().Incumbent})
		if status.Code(err) == codes.NotFound || err == nil && st.GetStatus().
			GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return nil
		}
		if crinode.Sleep(waiting, wait) == nil {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if deadline.Err() != nil {
			why := "it shows it running"
			if e := cmp.Or(stopErr, err); e != nil {
				why = status.Convert(e).Message()
			}
			i.c.Warn("the runtime did not say within %s that the old container has ended: %s", limit, why)
		}
		return nil // the successor serves; or kubelet has come, which is asked for before anything is shown
	}
}

// isGone reports whether the incumbent's process has ended, by the kernel's word where there
// is one: the runtime's comes later.
func (i *Incumbent) isGone(ctx context.Context) (bool, error) {
	if i.Exit.Over() {
		return true, nil
	}
	runs, err := i.runs(ctx)
	if err != nil {
		return false, fmt.Errorf("asking for the old container: %w", err)
	}
	return !runs, nil
}

// awaitGone waits for the incumbent to be gone, for that long at most; it asks once more when that
// is over.
func (i *Incumbent) awaitGone(ctx context.Context, within time.Duration) (bool, error) {
	for until := time.Now().Add(within); ; {
		last := time.Now().After(until)
		if gone, err := i.isGone(ctx); gone || err != nil || last {
			return gone, err
		}
		if err := crinode.Sleep(ctx, 50*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// ownPIDs reports whether the container has a PID namespace of its own: then its other processes,
// and what they hold, such as a port, have ended when the first one has.
func (i *Incumbent) ownPIDs() bool {
	return i.Request.GetConfig().GetLinux().GetSecurityContext().GetNamespaceOptions().
		GetPid() == runtimeapi.NamespaceMode_CONTAINER
}

// update adds to the resources of the successor what kubelet has asked for of the incumbent since
// they were read, and returns that; nil for nothing.
func (i *Incumbent) update() *runtimeapi.LinuxContainerResources {
	newer := i.c.Node.Records.Resources(i.c.Record().Incumbent)
	if newer == nil || proto.Equal(newer, i.recorded) {
		return nil
	}
	i.recorded, i.applied = newer, criclone.OverlayResources(i.applied, newer)
	return newer
}

// Load reads the incumbent and the request that made it, once.
func (i *Incumbent) Load(ctx context.Context) error {
	if i.Request != nil {
		return nil
	}
	rec := i.c.Record()
	// Before the runtime's own: what is recorded meanwhile is noticed as newer.
	recorded := i.c.Node.Records.Resources(rec.Incumbent)
	st, _, err := i.inspect(ctx)
	if err != nil {
		return err
	}
	i.Status = st
	err = i.c.Node.Retry(ctx, func() (err error) {
		i.Request, err = i.c.Node.RequestOf(ctx, rec.Incumbent, rec.Sandbox)
		return err
	})
	if err != nil {
		return operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	asked := criclone.OverlayResources(i.Request.GetConfig().GetLinux().GetResources(), recorded)
	i.recorded, i.applied = recorded, criclone.OverlayResources(recorded, criclone.ReportedResources(st, asked))
	return nil
}

// hasStopped asks until the runtime answers, or ctx ends.
func (i *Incumbent) hasStopped(ctx context.Context) (bool, error) {
	for {
		runs, err := i.runs(ctx)
		if err == nil {
			return !runs, nil
		}
		if err := crinode.Sleep(ctx, 200*time.Millisecond); err != nil {
			return false, err
		}
	}
}

// runs reports whether the incumbent is still running; false if it is gone.
func (i *Incumbent) runs(ctx context.Context) (bool, error) {
	st, err := i.c.Node.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: i.c.Record().Incumbent})
	if status.Code(err) == codes.NotFound {
		return false, nil
	}
	return st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING, err
}

// Hurry stops the incumbent, whose stop is under way, within that grace.
func (i *Incumbent) Hurry(ctx context.Context, grace time.Duration) {
	grace = max(grace, crinode.MinGrace)
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+crinode.CallTimeout)
	defer cancel()
	i.c.Log.WithField("grace", grace).Info("kubelet stops the container within a shorter time than before")
	_, err := i.c.Node.Runtime.StopContainer(call, &runtimeapi.StopContainerRequest{
		ContainerId: i.c.Record().Incumbent, Timeout: int64(grace / time.Second),
	})
	if err != nil {
		i.c.Log.WithError(err).Warn("container not stopped sooner")
	}
}

// LateGrace is how long a container of the pod that kubelet does not want is given to end, once
// kubelet's call waits for its end.
func (i *Incumbent) LateGrace(ctx context.Context) time.Duration {
	if i.Load(ctx) != nil {
		return crinode.MinGrace
	}
	return min(max(i.Grace(), crinode.MinGrace), crinode.MaxLateGrace)
}

// resources are those that the successor gets.
func (i *Incumbent) resources() *runtimeapi.LinuxContainerResources {
	return criclone.OverlayResources(i.Request.GetConfig().GetLinux().GetResources(), i.applied)
}
