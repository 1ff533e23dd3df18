// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// stopFirstFor has the incumbent stopped before the successor is started, which is staged anew.
// containerd makes a container's processes only at StartContainer
// (internal/cri/server/container_start.go NewTask): until then it takes nothing of the pod.
func (s *Switcher) stopFirstFor(ctx context.Context, why string) error {
	s.c.Warn("%s: the old container is stopped before the new one is started", why)
	s.c.Stager.withoutGate()
	return s.c.Stager.stageAnew(ctx, "")
}

// OOMKilled is containerd's reason for a container of which the kernel has killed a process for
// lack of memory (internal/cri/server/events.go handleEvent TaskOOM). With cgroup v1 the kernel
// tells of the whole pod, so that the container may go on with that reason.
const OOMKilled = "OOMKilled"

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
func (s *Switcher) giveUpOverlap(ctx context.Context, why error) error {
	if err := s.c.Interrupted(); err != nil {
		return err
	}
	if !s.c.Room.Lower(ctx) {
		return ctx.Err()
	}
	s.c.Warn("the new container does not start beside the old one (%v): the old one is stopped before the new one is "+
		"started", why)
	s.c.Stager.withoutGate()
	s.c.stopFirst = true
	s.c.Handle.Set(func(c *store.Container, _ *opsv1.ContainerOperation) { // on disk with the new stage
		c.StopFirst = true
		if !s.c.kind.Adopted() {
			c.Step = store.StepStaged
		}
	})
	if err := s.c.Stager.stageAnew(ctx, ""); err != nil {
		return err
	}
	return s.c.Stager.EnsureStaged(ctx)
}

// tellEnd warns of an incumbent that has not ended because it was asked to.
func (s *Switcher) tellEnd(ctx context.Context) {
	if s.c.Claim == nil || s.c.Record().Incumbent == "" {
		return
	}
	st, err := s.c.Node.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: s.c.Record().Incumbent})
	if err != nil {
		return // it is gone
	}
	old := st.GetStatus()
	const killed = 128 + 9
	oom := old.GetReason() == OOMKilled
	if old.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || old.GetExitCode() != killed && !oom {
		return
	}
	ended := time.Unix(0, old.GetFinishedAt())
	if s.c.Old.Exit.Over() && s.c.Old.Exit.At().Before(ended) {
		ended = s.c.Old.Exit.At() // each of the two may have noticed the end late
	}
	how := fmt.Sprintf("exit code %d", old.GetExitCode())
	if old.GetReason() != "" {
		how += ", " + old.GetReason()
	}
	why := ""
	if oom {
		why = " by the kernel, because memory had run out in its pod"
	}
	switch {
	case old.GetExitCode() != killed:
		s.c.Warn("memory had run out in the pod of the old container (%s), and the kernel has killed a process there",
			how)
	case !s.asked.IsZero() && ended.Before(s.asked):
		s.c.Warn("the old container was killed%s (%s) before it was asked to stop%s: it has not ended gracefully",
			why, how, s.besideAt(ended))
	case oom:
		s.c.Warn("the old container was killed%s (%s)%s: it has not ended gracefully", why, how, s.besideAt(ended))
	}
}

// besideAt says what the successor did at that time, if that may have been the reason for
// something.
func (s *Switcher) besideAt(at time.Time) string {
	switch {
	case s.beside.IsZero() || at.Before(s.beside):
		return ""
	case s.besideUntil.IsZero() || at.Before(s.besideUntil.Add(switchover.HookTimeout)):
		return ", while the new one was being started beside it"
	default:
		return ", while the new one was there beside it"
	}
}

// MakeRoom ends a successor that waits at its gate, if the incumbent has come to need the memory,
// and stages another one, which is started when the incumbent has ended.
func (s *Switcher) MakeRoom(ctx context.Context) error {
	if s.gate == nil {
		return nil
	}
	why := s.c.Room.Short(ctx)
	if why == "" {
		return nil
	}
	s.c.Stager.StopWithin(ctx, s.c.Successor(), crinode.MinGrace)
	if err := s.stopFirstFor(ctx, why); err != nil {
		return err
	}
	if err := s.c.Stager.EnsureStaged(ctx); err != nil {
		return err
	}
	return s.c.Write(func(c *store.Container, op *opsv1.ContainerOperation) { op.SuccessorId = c.Successor })
}
