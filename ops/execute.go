// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"sync"

	"github.com/sirupsen/logrus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/imageupdate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/restart"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// execute runs an operation to its end, or until ctx ends.
func (e *Engine) execute(ctx context.Context, o *operation.Operation) {
	log := e.log.WithFields(logrus.Fields{"op": o.UID()})
	if err := guard.Try(log, func() error { e.carryOut(ctx, o); return nil }); err != nil {
		guard.Do(log, func() { e.giveUp(ctx, o, err) })
	}
}

// container is what carries out the operation on one of its containers.
func (e *Engine) container(o *operation.Operation, i int) *swap.Container {
	if o.Upgrade() != nil {
		return swap.New(e.node, o, i, imageupdate.New)
	}
	return swap.New(e.node, o, i, restart.New)
}

// giveUp ends an operation that cannot be carried out, however far it has come.
func (e *Engine) giveUp(ctx context.Context, o *operation.Operation, why error) {
	if o.Finished() { // the panic came after that
		return
	}
	for i := range o.Request().GetContainers() {
		e.container(o, i).GiveUp(ctx, why)
	}
	e.finish(o)
}

// carryOut is execute, except that it panics.
func (e *Engine) carryOut(ctx context.Context, o *operation.Operation) {
	req := o.Request()
	var wg sync.WaitGroup
	failed := false
	for i := range req.GetContainers() {
		r := e.container(o, i)
		if !req.GetOrdered() {
			wg.Go(func() { r.Run(ctx) })
			continue
		}
		if failed {
			r.End(&operation.Outcome{
				Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonEarlierContainerFailed,
				Message: "not restarted because an earlier container failed",
			})
			continue
		}
		failed = !r.Run(ctx)
		if ctx.Err() != nil {
			break // the next process goes on, unless that was the last one
		}
	}
	wg.Wait()
	e.finish(o)
}

// finish ends the operation if all its containers have ended. An end that cannot be written is
// tried again until it is.
func (e *Engine) finish(o *operation.Operation) {
	err := o.Conclude(func(op *opsv1.Operation, stays []operation.Stay) {
		e.metrics.finished(op, stays)
		e.trace(op, stays)
		e.log.WithFields(logrus.Fields{
			"op": o.UID(), "pod": o.PodName(), "phase": op.GetPhase(), "requester": o.Requester(),
		}).Info("operation finished")
	})
	if err != nil {
		e.log.WithField("op", o.UID()).WithError(err).Error("end of operation not written; tried again until it is")
		e.operations.writeLater(o)
	}
}
