// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// beforeOverlap writes that the successor is about to run beside the incumbent.
func (r *restart) beforeOverlap(ctx context.Context) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	running, err := r.watchIncumbent(ctx)
	if err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	if !running {
		return r.stoppedByItself(ctx)
	}
	r.maskWhenGone()
	return r.write(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step, op.Phase = stepStart, opsv1.Phase_PHASE_STARTING
	})
}

// maskWhenGone has the incumbent masked from the moment it ends by itself: the successor takes its place. The caller knows that
// it runs, so the kernel tells that before the runtime does. The next process begins with the mask.
func (r *restart) maskWhenGone() {
	if r.exit == nil {
		r.claim.Mask() // nothing tells its end in time
		return
	}
	go func(w *switchover.Exit) { // ends with the process or the watch
		<-w.Done()
		if w.Over() {
			guard.Do(r.log, r.claim.Mask)
		}
	}(r.exit)
}

// overlap starts the successor while the incumbent runs and waits until it has run for the time asked for. The
// incumbent is left alone: an error from here means that it was not touched.
func (r *restart) overlap(ctx context.Context) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	if _, err := r.watchIncumbent(ctx); err != nil {
		return err
	}
	if err := r.interrupted(); err != nil { // resumed
		return err
	}
	if err := r.raise(ctx); err != nil {
		return err
	}
	r.failpoint("raised")
	r.beside = time.Now()
	err := r.start(ctx)
	r.besideUntil = time.Now()
	if err != nil {
		return err
	}
	r.failpoint("running")
	rec := r.rec()
	if r.up == nil { // kubelet does it when it takes the container over
		r.logLink(ctx, rec.Successor)
	}
	if err := r.postStartOnce(ctx); err != nil {
		return err
	}
	if err := r.awaitReady(ctx, rec.Successor); err != nil {
		return err
	}
	r.failpoint("ready")
	return nil
}

// awaitReady waits until the successor has run for the time asked for, or until there is nothing left to wait for.
func (r *restart) awaitReady(ctx context.Context, id string) error {
	wait, end := crinode.EndWith(ctx, r.claim.Yielded())
	defer end()
	wait, end = crinode.EndWith(wait, r.o.Cancelled())
	defer end()
	if gone := r.exit.Ended(); gone != nil {
		wait, end = crinode.EndWith(wait, gone)
		defer end()
	}
	until := time.Now().Add(time.Duration(r.want.GetMinReadySeconds()) * time.Second)
	for {
		if err := r.interrupted(); err != nil {
			return err
		}
		if err := r.successorRuns(ctx, id); err != nil {
			return err
		}
		left := time.Until(until)
		if left <= 0 || r.exit.Over() {
			return nil
		}
		_ = crinode.Sleep(wait, min(left, readyPoll)) // why it ended is asked above
	}
}

// successorRuns is nil if the successor, which has been started beside the incumbent, runs.
func (r *restart) successorRuns(ctx context.Context, id string) error {
	for try := 1; ; try++ {
		st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		s := st.GetStatus()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case status.Code(err) == codes.Unavailable && try < crinode.MaxTries:
			if err := r.node.AwaitReturn(ctx, try); err != nil {
				return err
			}
		case err != nil:
			return failf(opsv1.ReasonStartFailed, "reading the new container: %v", status.Convert(err).Message())
		case s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return failf(opsv1.ReasonNewContainerExited, "the new container ended with exit code %d after %s, "+
				"before the old one was to be stopped, which goes on; what it said is in %s",
				s.GetExitCode(), time.Duration(s.GetFinishedAt()-s.GetStartedAt()).Round(time.Millisecond), s.GetLogPath())
		default:
			return nil
		}
	}
}

// readyPoll is how often a container that is to become ready is looked at.
const readyPoll = 250 * time.Millisecond
