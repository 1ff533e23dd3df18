// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Switcher lets the successor take the place of the incumbent.
type Switcher struct {
	c    *Container
	gate *gate.Gate // of the successor, once it waits there
	pid  int        // of the process that waits there; 0 if this process cannot look at it
	held bool       // the successor has been started behind a gate that is not open
	// untouched is set while the step is stop and nothing has been stopped or started yet. Only the
	// process that has written the step knows.
	untouched bool
	// asked is when this process asked the incumbent to stop. From beside to besideUntil it had the
	// successor started beside the incumbent.
	asked, beside, besideUntil time.Time
}

// NothingTouched says that this process has written the step stop, and has stopped and started
// nothing yet.
func (s *Switcher) NothingTouched() { s.untouched = true }

// WaitsAtGate says that the successor waits at its gate.
func (s *Switcher) WaitsAtGate() { s.held = true }

// Swap stops the incumbent and lets the successor run. It is the only part that the
// application notices, so nothing in it waits for the disk.
func (s *Switcher) Swap(ctx context.Context) error {
	s.untouched = false
	if err := s.c.Old.Load(ctx); err != nil {
		return err
	}
	running, err := s.c.Old.Watch(ctx)
	if err != nil {
		return err
	}
	by, began := s.c.Record().StopBy, time.Now()
	switch {
	case s.c.Record().Method == opsv1.MethodGate:
		err = s.Arm(ctx)
	case s.c.Overlaps() && running: // still so after the preStop hook, or in the next process?
		err = s.SuccessorRuns(ctx, s.c.Record().Successor)
	}
	if err != nil {
		return err
	}
	if err := s.c.Interrupted(); err != nil {
		return err
	}
	by = by.Add(time.Since(began)) // the incumbent's grace is for what it does, not for what we do
	s.asked = time.Now()
	stopped := make(chan error, 1)
	go func() {
		stopped <- guard.Try(s.c.Log, func() error { return s.c.Node.Stop(ctx, s.c.Record().Incumbent, by) })
	}() // ends with the call, which is waited for below
	gone := s.c.Old.Exit.Ended()
	if s.c.Record().Method == opsv1.MethodPlain {
		gone = nil
	}
	var stopErr error
	select {
	case <-gone:
		err = s.switchOver(ctx)
		stopErr = <-stopped
	case err = <-stopped:
		if err == nil {
			err = s.switchOver(ctx)
		}
	}
	if err == nil {
		err = s.c.Old.awaitExited(ctx, stopErr)
	}
	if err != nil {
		return err
	}
	begun, err := s.hasBegun(ctx)
	if err != nil {
		return err
	}
	s.c.Note(func(rec *store.Container, c *opsv1.ContainerOperation) {
		rec.Step = store.StepStarted
		if !begun {
			rec.Step = store.StepAsk
		}
		c.Phase = opsv1.Phase_PHASE_STARTING
		c.SuccessorId = rec.Successor
	})
	return nil
}

// hasBegun reports whether the successor has begun, or may have. That of an upgrade has not if it
// is to wait for kubelet's request, unless a process before this one knew that it need not.
func (s *Switcher) hasBegun(ctx context.Context) (bool, error) {
	switch rec := s.c.Record(); {
	case s.c.IsCertain() || s.c.Overlaps():
		return true, nil
	case rec.Method == opsv1.MethodGate:
		return s.gate == nil, nil
	case rec.Successor == "":
		return false, nil
	default:
		var st *runtimeapi.ContainerStatusResponse
		err := s.c.Node.Retry(ctx, func() (err error) {
			st, err = s.c.Node.Runtime.ContainerStatus(ctx,
				&runtimeapi.ContainerStatusRequest{ContainerId: rec.Successor})
			return err
		})
		if err != nil {
			return false, operation.Failf(opsv1.ReasonRuntimeError, "reading the new container: %v",
				status.Convert(err).Message())
		}
		return st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_CREATED, nil
	}
}

// switchOver lets the successor run, now that the incumbent's processes are gone.
func (s *Switcher) switchOver(ctx context.Context) error {
	s.c.Failpoint("stopped")
	// after the failpoint: a test takes the slot back while the restart waits there
	if err := s.c.Interrupted(); err != nil {
		return err
	}
	var err error
	switch method := s.c.Record().Method; {
	case method == opsv1.MethodOverlap: // it does
	case !s.c.IsCertain(): // it begins when kubelet has asked for it
		return nil
	case method == opsv1.MethodGate:
		err = s.openGate(ctx)
	default:
		err = s.start(ctx)
	}
	if err == nil && !s.c.Overlaps() {
		s.c.Failpoint("running")
	}
	return err
}

// start starts the successor; once, from a fresh stage, if that fails.
func (s *Switcher) start(ctx context.Context) error {
	for {
		if err := s.c.Stager.EnsureStaged(ctx); err != nil {
			return err
		}
		rec := s.c.Record()
		err := s.c.Node.StartOnce(ctx, rec.Successor)
		if err == nil {
			return nil
		}
		var out *operation.Outcome
		if !errors.As(err, &out) || rec.Retried || s.c.Overlaps() && besideFails(err) {
			return err
		}
		if err := s.c.Stager.stageAnew(ctx, out.Message); err != nil {
			return err
		}
	}
}
