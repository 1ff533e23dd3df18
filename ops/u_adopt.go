// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// adoptTimeout is how long kubelet may take from the stop of the old container to the creation of
// the new one: with pull policy Always it asks the registry in between. If it does not come at all,
// because it was restarted in between, it has found the successor running and has nothing to do.
const adoptTimeout = 2 * time.Minute

// adopter answers the CreateContainer that follows kubelet's stop of the incumbent.
type adopter struct {
	c *Container
	d *upgrader
}

// awaitRequest answers kubelet's stop of an incumbent whose successor need not be what kubelet asks
// for, and waits for the request: the successor has run nothing yet. ended says that nothing is
// left to do.
func (a *adopter) awaitRequest(ctx context.Context) (ended bool, err error) {
	if err := a.d.rearm(ctx); err != nil {
		return true, err
	}
	a.d.kubelet.stopBy(time.Time{})
	a.d.answerStops()
	a.c.failpoint("asking")
	limit := orElse(a.c.op.Upgrade().GetHoldTimeout(), defaultHold)
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	for {
		select {
		case q := <-a.d.kubelet.stops:
			q.answer <- true // it has been
		case q := <-a.d.kubelet.creates:
			if differing := a.c.stager.differs(ctx, q.Request); len(differing) > 0 {
				err := a.leaveCreation(ctx, differing, 0)
				if err == nil {
					a.c.revealer.holdNext(ctx, adoptTimeout)
				}
				return true, err
			}
			// Before it begins, for the next process.
			a.c.note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Step, c.Asked = store.StepStop, true })
			a.d.asked = q
			return false, nil
		case <-a.c.claim.Yielded():
			return true, a.c.interrupted()
		case <-timeout.C:
			return true, operation.Failf(opsv1.ReasonHoldTimeout,
				"kubelet has stopped the container and not asked for the "+
					"new one within %s", limit)
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
}

// awaitAdoption answers kubelet's CreateContainer with the successor, if that is what it asks for.
func (a *adopter) awaitAdoption(ctx context.Context) error {
	a.d.revealed = true
	if err := a.c.room.TryLower(); err != nil {
		a.c.log.WithError(err).Info("the pod's limit of memory is not taken back yet")
	}
	if a.c.op.Rebooted() {
		return nil // the spec has the new image, of which kubelet makes the container anew
	}
	if a.c.rec().Asked && a.d.asked == nil {
		// The process before this one was asked. If its answer was cut off, kubelet looks again,
		// finds the successor, and asks no more.
		return a.unasked(ctx)
	}
	timeout := time.NewTimer(adoptTimeout)
	defer timeout.Stop()
	if q := a.d.asked; q != nil {
		a.d.asked = nil
		if ended, err := a.adopt(ctx, q); ended || err != nil {
			return err
		}
	}
	for {
		select {
		case q := <-a.d.kubelet.stops:
			q.answer <- true // it has been: kubelet repeats a call that was cut off
		case q := <-a.d.kubelet.creates:
			if ended, err := a.adopt(ctx, q); ended || err != nil {
				return err
			}
		case <-a.c.claim.Yielded():
			a.c.log.Info("the pod goes away, stopping the new container")
			a.c.stager.stopWithin(ctx, a.c.successor(),
				time.Duration(min(max(a.c.rec().Grace, 2), int64(crinode.MaxLateGrace/time.Second)))*time.Second)
			return a.c.interrupted()
		case <-timeout.C:
			return a.unasked(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// adopt answers one CreateContainer. ended says that nothing is left to wait for.
func (a *adopter) adopt(ctx context.Context, q *Creation) (ended bool, err error) {
	asked, ours := q.Request.GetConfig().GetMetadata().GetAttempt(), a.c.status().GetAttempt()
	var differing []string
	if asked <= ours {
		if differing = a.c.stager.differs(ctx, q.Request); len(differing) == 0 {
			// Before anything else, for the next process.
			if _, err := a.c.handle.Write(func(c *store.Container,
				_ *opsv1.ContainerOperation) {
				c.Asked = true
			}); err != nil {
				a.c.log.WithError(err).Warn("not written that kubelet has asked for the new container")
			}
		}
	}
	a.c.failpoint("adopt")
	if asked > ours {
		// Kubelet knows the successor, which has ended or been stopped since.
		if !a.isOurs(q.Request) {
			return true, tookAnotherImage()
		}
		return true, nil
	}
	if len(differing) == 0 {
		a.c.stager.matchResources(ctx, q.Request)
		q.Adopt(a.c.successor())
		return true, nil
	}
	err = a.leaveCreation(ctx, differing, min(max(a.c.old.podGrace(ctx), crinode.MinGrace), crinode.MaxLateGrace))
	if err == nil {
		a.c.revealer.holdNext(ctx, adoptTimeout)
	}
	return true, err
}

// unasked ends an upgrade whose successor kubelet has found by itself, if it is there.
func (a *adopter) unasked(ctx context.Context) error {
	if _, err := a.c.node.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: a.c.successor()}); status.Code(err) == codes.NotFound {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"the new container was removed before kubelet asked for it: "+
				"has the pod gone away?")
	}
	a.c.revealer.logLink(ctx, a.c.successor())
	return nil
}

// leaveCreation lets kubelet make the container, because it asks for another one than the
// successor, which has this time to end.
func (a *adopter) leaveCreation(ctx context.Context, differing []string, grace time.Duration) error {
	a.c.log.WithField("differing", differing).
		Warn("kubelet asks for another container than was prepared: it makes its own")
	if grace > 0 {
		a.c.stager.stopWithin(ctx, a.c.successor(), grace)
	}
	if err := a.c.stager.removeContainer(ctx, a.c.successor()); err != nil {
		return operation.Failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	if slices.Contains(differing, "image") || slices.Contains(differing, "annotations."+criclone.AnnotationHash) {
		return tookAnotherImage()
	}
	a.c.warn("kubelet made the container itself, because it asked for another one than was prepared: %s",
		strings.Join(differing, ", "))
	a.c.show(func(c *opsv1.ContainerOperation) { // those of the successor that is gone
		c.SuccessorId, c.Gap, c.StartTime = "", nil, nil
	})
	a.c.setMethod(opsv1.MethodKubelet)
	return nil
}

// isOurs reports whether what kubelet asks for has the image of the upgrade.
func (a *adopter) isOurs(asked *runtimeapi.CreateContainerRequest) bool {
	return asked.GetConfig().GetAnnotations()[criclone.AnnotationHash] == criclone.KubeletHash(a.c.spec.GetName(),
		a.c.image.Image())
}

func tookAnotherImage() *operation.Outcome {
	return operation.Failf(opsv1.ReasonTakenBackByKubelet,
		"kubelet restarted the container with another image than the "+
			"upgrade's: was the pod's spec patched?")
}
