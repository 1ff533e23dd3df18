// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// MaskWhenGone has the incumbent masked from the moment it ends by itself: the successor takes its
// place. The caller knows that it runs, so the kernel tells that before the runtime does. The next
// process begins with the mask.
func (s *Switcher) MaskWhenGone() {
	if s.c.Old.Exit == nil {
		s.c.Claim.Mask() // nothing tells its end in time
		return
	}
	go func(w *switchover.Exit) { // ends with the process or the watch
		<-w.Done()
		if w.Over() {
			guard.Do(s.c.Log, s.c.Claim.Mask)
		}
	}(s.c.Old.Exit)
}

// Overlap starts the successor while the incumbent runs and waits until it has run for the time
// asked for. Where the successor does not start beside the incumbent, the incumbent is to be
// stopped first from then on. An error means that the incumbent was not touched.
func (s *Switcher) Overlap(ctx context.Context) error {
	err := s.startBeside(ctx)
	if besideFails(err) {
		return s.giveUpOverlap(ctx, err)
	}
	return err
}

// startBeside starts the successor while the incumbent runs, and waits until it is ready.
func (s *Switcher) startBeside(ctx context.Context) error {
	if err := s.c.Old.Load(ctx); err != nil {
		return err
	}
	if _, err := s.c.Old.Watch(ctx); err != nil {
		return err
	}
	if err := s.c.Interrupted(); err != nil { // resumed
		return err
	}
	if err := s.c.Room.Raise(ctx, s.c.Old.resources()); err != nil {
		return err
	}
	s.c.Failpoint("raised")
	s.beside = time.Now()
	err := s.start(ctx)
	s.besideUntil = time.Now()
	if err != nil {
		return err
	}
	s.c.Failpoint("running")
	rec := s.c.Record()
	if !s.c.kind.Adopted() { // kubelet does it when it takes the container over
		s.c.Revealer.LogLink(ctx, rec.Successor)
	}
	if err := s.c.Revealer.PostStart(ctx); err != nil {
		return err
	}
	if err := s.awaitReady(ctx, rec.Successor); err != nil {
		return err
	}
	s.c.Failpoint("ready")
	return nil
}

// awaitReady waits until the successor has run for the time asked for, or until there is nothing
// left to wait for.
func (s *Switcher) awaitReady(ctx context.Context, id string) error {
	wait, end := crinode.EndWith(ctx, s.c.Claim.Yielded())
	defer end()
	wait, end = crinode.EndWith(wait, s.c.Op.Cancelled())
	defer end()
	if gone := s.c.Old.Exit.Ended(); gone != nil {
		wait, end = crinode.EndWith(wait, gone)
		defer end()
	}
	until := time.Now().Add(time.Duration(s.c.Spec.GetMinReadySeconds()) * time.Second)
	for {
		if err := s.c.Interrupted(); err != nil {
			return err
		}
		if err := s.SuccessorRuns(ctx, id); err != nil {
			return err
		}
		left := time.Until(until)
		if left <= 0 || s.c.Old.Exit.Over() {
			return nil
		}
		_ = crinode.Sleep(wait, min(left, readyPoll)) // why it ended is asked above
	}
}

// SuccessorRuns is nil if the successor, which has been started beside the incumbent, runs.
func (s *Switcher) SuccessorRuns(ctx context.Context, id string) error {
	for try := 1; ; try++ {
		st, err := s.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		now := st.GetStatus()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case status.Code(err) == codes.Unavailable && try < crinode.MaxTries:
			if err := s.c.Node.AwaitReturn(ctx, try); err != nil {
				return err
			}
		case err != nil:
			return operation.Failf(opsv1.ReasonStartFailed, "reading the new container: %v",
				status.Convert(err).Message())
		case now.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return operation.Failf(opsv1.ReasonNewContainerExited,
				"the new container ended with exit code %d after %s, "+
					"before the old one was to be stopped, which goes on; what it said is in %s",
				now.GetExitCode(), time.Duration(now.GetFinishedAt()-now.GetStartedAt()).Round(time.Millisecond),
				now.GetLogPath())
		default:
			return nil
		}
	}
}

// readyPoll is how often a container that is to become ready is looked at.
const readyPoll = 250 * time.Millisecond
