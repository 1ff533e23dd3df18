// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// stopFirstFor has the incumbent stopped before the successor is started, which is staged anew.
// containerd makes a container's processes only at StartContainer
// (internal/cri/server/container_start.go NewTask): until then it takes nothing of the pod.
func (s *switcher) stopFirstFor(ctx context.Context, why string) error {
	s.c.warn("%s: the old container is stopped before the new one is started", why)
	s.c.stager.withoutGate()
	return s.c.stager.stageAnew(ctx, "")
}

// makeRoom ends a successor that waits at its gate, if the incumbent has come to need the memory,
// and stages another one, which is started when the incumbent has ended.
func (r *Container) makeRoom(ctx context.Context) error {
	if r.switcher.gate == nil {
		return nil
	}
	why := r.room.Short(ctx)
	if why == "" {
		return nil
	}
	r.stager.stopWithin(ctx, r.successor(), crinode.MinGrace)
	if err := r.switcher.stopFirstFor(ctx, why); err != nil {
		return err
	}
	if err := r.stager.ensureStaged(ctx); err != nil {
		return err
	}
	return r.write(func(c *store.Container, op *opsv1.ContainerOperation) { op.SuccessorId = c.Successor })
}

// resources are those that the successor gets.
func (r *Container) resources() *runtimeapi.LinuxContainerResources {
	return criclone.OverlayResources(r.old.request.GetConfig().GetLinux().GetResources(), r.old.applied)
}

// oomKilled is containerd's reason for a container of which the kernel has killed a process for
// lack of memory (internal/cri/server/events.go handleEvent TaskOOM). With cgroup v1 the kernel
// tells of the whole pod, so that the container may go on with that reason.
const oomKilled = "OOMKilled"

// tellEnd warns of an incumbent that has not ended because it was asked to.
func (r *Container) tellEnd(ctx context.Context) {
	if r.claim == nil || r.rec().Incumbent == "" {
		return
	}
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: r.rec().Incumbent})
	if err != nil {
		return // it is gone
	}
	s := st.GetStatus()
	const killed = 128 + 9
	oom := s.GetReason() == oomKilled
	if s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() != killed && !oom {
		return
	}
	ended := time.Unix(0, s.GetFinishedAt())
	if r.old.exit.Over() {
		ended = r.old.exit.At()
	}
	how := fmt.Sprintf("exit code %d", s.GetExitCode())
	if s.GetReason() != "" {
		how += ", " + s.GetReason()
	}
	why := ""
	if oom {
		why = " by the kernel, because memory had run out in its pod"
	}
	switch {
	case s.GetExitCode() != killed:
		r.warn("memory had run out in the pod of the old container (%s), and the kernel has killed a process there",
			how)
	case !r.switcher.asked.IsZero() && ended.Before(r.switcher.asked):
		r.warn("the old container was killed%s (%s) before it was asked to stop%s: it has not ended gracefully",
			why, how, r.besideAt(ended))
	case oom:
		r.warn("the old container was killed%s (%s)%s: it has not ended gracefully", why, how, r.besideAt(ended))
	}
}

// besideAt says what the successor did at that time, if that may have been the reason for
// something.
func (r *Container) besideAt(at time.Time) string {
	switch {
	case r.switcher.beside.IsZero() || at.Before(r.switcher.beside):
		return ""
	case r.switcher.besideUntil.IsZero() || at.Before(r.switcher.besideUntil.Add(switchover.HookTimeout)):
		return ", while the new one was being started beside it"
	default:
		return ", while the new one was there beside it"
	}
}

// besideErrors are what runc says of a start that may have failed because the incumbent has what
// the successor needs: memory, process IDs, a device, the name of a cgroup.
var besideErrors = []string{
	"procready not received",           // runc init ended before it could tell (libcontainer/process_linux.go)
	"can't get final child",            // its first stages did
	"oom-killed",                       // the kernel has killed it
	"cannot allocate memory",           // ENOMEM
	"resource temporarily unavailable", // EAGAIN: no process IDs left
	"device or resource busy",          // EBUSY
}

// besideFails reports whether a start has failed in a way that it may not fail in once the
// incumbent is gone.
func besideFails(err error) bool {
	var out *operation.Outcome
	if !errors.As(err, &out) || out.Reason != opsv1.ReasonStartFailed {
		return false
	}
	said := strings.ToLower(out.Message)
	return slices.ContainsFunc(besideErrors, func(e string) bool { return strings.Contains(said, e) })
}

// giveUpOverlap goes on as StopFirst does, because the successor has not started beside the
// incumbent, which is untouched.
func (s *switcher) giveUpOverlap(ctx context.Context, why error) error {
	if err := s.c.interrupted(); err != nil {
		return err
	}
	if !s.c.room.Lower(ctx) {
		return ctx.Err()
	}
	s.c.warn("the new container does not start beside the old one (%v): the old one is stopped before the new one is "+
		"started", why)
	s.c.stager.withoutGate()
	s.c.stopFirst = true
	s.c.handle.Set(func(c *store.Container, _ *opsv1.ContainerOperation) { // on disk with the new stage
		c.StopFirst = true
		if !s.c.kind.Adopted() {
			c.Step = store.StepStaged
		}
	})
	if err := s.c.stager.stageAnew(ctx, ""); err != nil {
		return err
	}
	return s.c.stager.ensureStaged(ctx)
}
