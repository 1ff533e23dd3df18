// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// AdoptTimeout is how long kubelet may take from the stop of the old container to the creation of
// the new one: with pull policy Always it asks the registry in between. If it does not come at all,
// because it was restarted in between, it has found the successor running and has nothing to do.
const AdoptTimeout = 2 * time.Minute

// adopter answers the CreateContainer that follows kubelet's stop of the incumbent.
type adopter struct {
	c *swap.Container
	d *driver
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
	a.c.Failpoint("asking")
	limit := orElse(a.c.Op.Upgrade().GetHoldTimeout(), swap.DefaultHold)
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	for {
		select {
		case q := <-a.d.kubelet.stops:
			q.answer <- true // it has been
		case q := <-a.d.kubelet.creates:
			if differing := a.c.Stager.Differs(ctx, q.Request); len(differing) > 0 {
				err := a.leaveCreation(ctx, differing, 0)
				if err == nil {
					a.c.Revealer.HoldNext(ctx, AdoptTimeout)
				}
				return true, err
			}
			// Before it begins, for the next process.
			a.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Step, c.Asked = store.StepStop, true })
			a.d.asked = q
			return false, nil
		case <-a.c.Claim.Yielded():
			return true, a.c.Interrupted()
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
	if err := a.c.Room.TryLower(); err != nil {
		a.c.Log.WithError(err).Info("the pod's limit of memory is not taken back yet")
	}
	if a.c.Op.Rebooted() {
		return nil // the spec has the new image, of which kubelet makes the container anew
	}
	if a.c.Record().Asked && a.d.asked == nil {
		// The process before this one was asked. If its answer was cut off, kubelet looks again,
		// finds the successor, and asks no more.
		return a.unasked(ctx)
	}
	timeout := time.NewTimer(AdoptTimeout)
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
		case <-a.c.Claim.Yielded():
			a.c.Log.Info("the pod goes away, stopping the new container")
			a.c.Stager.StopWithin(ctx, a.c.Successor(),
				time.Duration(min(max(a.c.Record().Grace, 2), int64(crinode.MaxLateGrace/time.Second)))*time.Second)
			return a.c.Interrupted()
		case <-timeout.C:
			return a.unasked(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// adopt answers one CreateContainer. ended says that nothing is left to wait for.
func (a *adopter) adopt(ctx context.Context, q *view.Creation) (ended bool, err error) {
	asked, ours := q.Request.GetConfig().GetMetadata().GetAttempt(), a.c.Status().GetAttempt()
	var differing []string
	if asked <= ours {
		if differing = a.c.Stager.Differs(ctx, q.Request); len(differing) == 0 {
			// Before anything else, for the next process.
			if _, err := a.c.Handle.Write(func(c *store.Container,
				_ *opsv1.ContainerOperation) {
				c.Asked = true
			}); err != nil {
				a.c.Log.WithError(err).Warn("not written that kubelet has asked for the new container")
			}
		}
	}
	a.c.Failpoint("adopt")
	if asked > ours {
		// Kubelet knows the successor, which has ended or been stopped since.
		if !a.isOurs(q.Request) {
			return true, tookAnotherImage()
		}
		return true, nil
	}
	if len(differing) == 0 {
		a.c.Stager.MatchResources(ctx, q.Request)
		q.Adopt(a.c.Successor())
		return true, nil
	}
	err = a.leaveCreation(ctx, differing, a.c.Old.LateGrace(ctx))
	if err == nil {
		a.c.Revealer.HoldNext(ctx, AdoptTimeout)
	}
	return true, err
}

// unasked ends an upgrade whose successor kubelet has found by itself, if it is there.
func (a *adopter) unasked(ctx context.Context) error {
	if _, err := a.c.Node.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: a.c.Successor()}); status.Code(err) == codes.NotFound {
		return operation.Failf(opsv1.ReasonTakenBackByKubelet,
			"the new container was removed before kubelet asked for it: "+
				"has the pod gone away?")
	}
	a.c.Revealer.LogLink(ctx, a.c.Successor())
	return nil
}

// leaveCreation lets kubelet make the container, because it asks for another one than the
// successor, which has this time to end.
func (a *adopter) leaveCreation(ctx context.Context, differing []string, grace time.Duration) error {
	a.c.Log.WithField("differing", differing).
		Warn("kubelet asks for another container than was prepared: it makes its own")
	if grace > 0 {
		a.c.Stager.StopWithin(ctx, a.c.Successor(), grace)
	}
	if err := a.c.Stager.Remove(ctx, a.c.Successor()); err != nil {
		return operation.Failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	if slices.Contains(differing, "image") || slices.Contains(differing, "annotations."+criclone.AnnotationHash) {
		return tookAnotherImage()
	}
	a.c.Warn("kubelet made the container itself, because it asked for another one than was prepared: %s",
		strings.Join(differing, ", "))
	a.c.Show(func(c *opsv1.ContainerOperation) { // those of the successor that is gone
		c.SuccessorId, c.Gap, c.StartTime = "", nil, nil
	})
	a.c.SetMethod(opsv1.MethodKubelet)
	return nil
}

// isOurs reports whether what kubelet asks for has the image of the upgrade.
func (a *adopter) isOurs(asked *runtimeapi.CreateContainerRequest) bool {
	return asked.GetConfig().GetAnnotations()[criclone.AnnotationHash] == criclone.KubeletHash(a.c.Spec.GetName(),
		a.c.Image.Image())
}

func tookAnotherImage() *operation.Outcome {
	return operation.Failf(opsv1.ReasonTakenBackByKubelet,
		"kubelet restarted the container with another image than the "+
			"upgrade's: was the pod's spec patched?")
}
