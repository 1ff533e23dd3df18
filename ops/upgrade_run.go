// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// upgrade is what a restart that is an upgrade has beyond that.
type upgrade struct {
	kubelet
	// pending are kubelet's stops that wait for the successor, and asked its creation that has come before that.
	pending []stopped
	asked   *created
	// revealed is set once kubelet may have seen the successor.
	revealed bool
}

func newUpgrade() *upgrade { return &upgrade{kubelet: newKubelet()} }

// driveUpgrade is drive for an upgrade: everything that takes time is done before kubelet is involved, and what
// stops the incumbent is kubelet's own StopContainer.
func (r *Container) driveUpgrade(ctx context.Context) error {
	defer r.leaveSlot()
	if r.claim != nil {
		r.keepSlot()
		r.drives()
		if err := r.resume(ctx); err != nil {
			return err
		}
		if r.rec().Step == store.StepNone {
			// Nothing is staged any more. The image comes first again, which may take long: not while kubelet waits for the slot.
			r.dropSlot()
		}
	}
	for {
		var err error
		switch s := r.rec().Step; s {
		case store.StepNone:
			if r.rec().Method != opsv1.MethodKubelet {
				err = r.prepare(ctx)
			}
			if err == nil && r.rec().Method == opsv1.MethodKubelet {
				return r.leaveToKubelet(ctx)
			}
		case store.StepHeld:
			err = r.awaitCommit(ctx)
		case store.StepStart, store.StepArm:
			err = r.makeReady(ctx)
		case store.StepArmed:
			err = r.awaitKubelet(ctx)
		case store.StepStop:
			err = r.switcher.swap(ctx)
		case store.StepAsk:
			ended := false
			if ended, err = r.awaitRequest(ctx); ended {
				return err
			}
		case store.StepStarted:
			err = r.showSuccessor(ctx)
		case store.StepReveal:
			return r.awaitAdoption(ctx)
		default:
			return operation.Failf(opsv1.ReasonJournalError, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// drives lets kubelet drive.
func (r *Container) drives() {
	switch r.rec().Step {
	case store.StepArmed, store.StepStop, store.StepAsk, store.StepStarted, store.StepReveal:
		r.up.listen(true)
	}
	// What waited at its gate in the process before this one waits still, and needs no time to stop.
	if s := r.rec().Step; r.rec().Method == opsv1.MethodGate && (s == store.StepArm || s == store.StepArmed || s == store.StepAsk) {
		r.switcher.held = true
	}
	if rec := r.rec(); rec.Step == store.StepStop {
		r.up.stopBy(rec.StopBy)
	}
	r.claim.Drive(&r.up.kubelet)
}

// prepare pulls the image, checks it, takes the slot and stages the successor.
func (r *Container) prepare(ctx context.Context) error {
	limit := orElse(r.op.Upgrade().GetPrepareTimeout(), defaultPrepare)
	return r.withinPatience(ctx, r.op.CreateTime(), limit, func(ctx context.Context) error {
		if err := r.pullImage(ctx); err != nil {
			return err
		}
		if err := r.ensureVolumes(ctx); err != nil {
			return err
		}
		// Before the slot is taken, another operation may have a container of its own in it.
		if err := r.takeUpgradeSlot(ctx); err != nil {
			return err
		}
		r.drives()
		if err := r.checkImage(ctx); err != nil {
			return err
		}
		if r.rec().Method == opsv1.MethodKubelet {
			r.dropSlot()
			return nil
		}
		return r.stager.stage(ctx)
	})
}

// checkImage finds out whether the successor can be made here, and whether the image fits. If only kubelet can make it, the
// method is [MethodKubelet].
func (r *Container) checkImage(ctx context.Context) error {
	found, err := r.node.Resolve(ctx, r.op.Pod(), r.spec, false)
	if err != nil {
		var out *operation.Outcome
		if errors.As(err, &out) {
			return out
		}
		return fmt.Errorf("finding the container: %w", err)
	}
	r.pinOld(ctx, found)
	request, err := r.fitImage(ctx, found)
	var none *noRequestError
	switch {
	case errors.As(err, &none):
		r.toKubelet("%v", err)
		return nil
	case err != nil:
		return err
	}
	config := request.GetConfig()
	o, runs := r.node.Overrides.Of(r.slot()), config.GetImage().GetUserSpecifiedImage()
	was := o.SpecImageOf(runs)
	switch {
	case was != runs && was == r.change.want.GetImage():
		return operation.Failf(opsv1.ReasonImageUnchanged, "container %q has image %s in its spec already, and runs %s in "+
			"its place: revert that override instead", r.spec.GetName(), was, o.Image)
	case was == r.change.want.GetImage():
		return r.sameName(ctx, config)
	case config.GetAnnotations()[criclone.AnnotationHash] != criclone.KubeletHash(config.GetMetadata().GetName(), was):
		r.toKubelet("kubelet's hash of the container is not that of its name and image, so it would not take over a container made here (is kubelet older than 1.31?)")
	}
	return nil
}

// sameName ends the preparation of the image that the container's spec has: there is nothing that kubelet would do. With pull policy Always
// the tag has just been resolved again, and who asks is told whether a restart would start something else. That is no failure.
func (r *Container) sameName(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	name := r.change.want.GetImage()
	if r.change.want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		return operation.Failf(opsv1.ReasonImageUnchanged, "container %q has image %s in its spec already: kubelet would "+
			"leave it as it is (restart it instead)", r.spec.GetName(), name)
	}
	now, err := r.imageOnNode(ctx, name)
	if err != nil {
		return err
	}
	if now == nil {
		return operation.Failf(opsv1.ReasonPullFailed, "the runtime does not know %s, which has been pulled: was it removed "+
			"meanwhile?", name)
	}
	runs := c.GetImage().GetImage()
	old, err := r.imageOnNode(ctx, runs)
	if err != nil {
		return err
	}
	if old != nil {
		runs = old.GetId()
	}
	out := &operation.Outcome{
		Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonImageUnchanged,
		Message: fmt.Sprintf("container %q has image %s in its spec already, and runs what that names now",
			r.spec.GetName(), name),
	}
	if now.GetId() != runs {
		out.Reason = opsv1.ReasonImageMoved
		out.Message = fmt.Sprintf("container %q has image %s in its spec already, "+
			"which names another image now than the one that runs: a restart starts it", r.spec.GetName(), name)
	}
	return out
}

// toKubelet has kubelet make the successor.
func (r *Container) toKubelet(format string, args ...any) {
	r.warn("only the image is put ready, kubelet makes the container: "+format, args...)
	r.setMethod(opsv1.MethodKubelet)
}

// leaveToKubelet waits for the commit of an upgrade of which only the image has been prepared.
func (r *Container) leaveToKubelet(ctx context.Context) error {
	// The next process needs not do it again.
	err := r.write(func(rec *store.Container, c *opsv1.ContainerOperation) {
		c.Phase = opsv1.Phase_PHASE_PREPARED
		if rec.HoldSince.IsZero() {
			rec.HoldSince = time.Now()
		}
	})
	if err != nil {
		return err
	}
	if err := r.awaitRelease(ctx); err != nil {
		return err
	}
	r.revealer.holdNext(ctx, orElse(r.op.Upgrade().GetHoldTimeout(), defaultHold))
	return nil
}

// dress makes the clone of the incumbent what kubelet will ask for once the pod's spec has the new image.
func (r *Container) dress(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	if err := r.useImage(ctx, c); err != nil {
		return err
	}
	c.Annotations[criclone.AnnotationHash] = criclone.KubeletHash(c.GetMetadata().GetName(), r.change.want.GetImage())
	return nil
}

// endOthers takes the rest of the upgrade back: a pod with one of two images new is what nobody asked for.
func (r *Container) endOthers() {
	c := r.status()
	if c.GetReason() == opsv1.ReasonCancelled {
		return
	}
	if err := r.op.Cancel(fmt.Sprintf("container %s: %s", c.GetName(), c.GetMessage())); err != nil {
		r.log.WithError(err).Info("the other containers of the upgrade go on")
	}
}
