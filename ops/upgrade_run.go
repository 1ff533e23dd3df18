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
func (r *restart) driveUpgrade(ctx context.Context) error {
	defer r.leaveSlot()
	if r.claim != nil {
		r.keepSlot()
		r.drives()
		if err := r.resume(ctx); err != nil {
			return err
		}
		if r.rec().Step == stepNone {
			// Nothing is staged any more. The image comes first again, which may take long: not while kubelet waits for the slot.
			r.dropSlot()
		}
	}
	for {
		var err error
		switch s := r.rec().Step; s {
		case stepNone:
			if r.rec().Method != opsv1.MethodKubelet {
				err = r.prepare(ctx)
			}
			if err == nil && r.rec().Method == opsv1.MethodKubelet {
				return r.leaveToKubelet(ctx)
			}
		case stepHeld:
			err = r.awaitCommit(ctx)
		case stepStart, stepArm:
			err = r.makeReady(ctx)
		case stepArmed:
			err = r.awaitKubelet(ctx)
		case stepStop:
			err = r.swap(ctx)
		case stepAsk:
			ended := false
			if ended, err = r.awaitRequest(ctx); ended {
				return err
			}
		case stepStarted:
			err = r.showSuccessor(ctx)
		case stepReveal:
			return r.awaitAdoption(ctx)
		default:
			return failf(opsv1.ReasonJournalError, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// drives lets kubelet drive.
func (r *restart) drives() {
	switch r.rec().Step {
	case stepArmed, stepStop, stepAsk, stepStarted, stepReveal:
		r.up.listen(true)
	}
	// What waited at its gate in the process before this one waits still, and needs no time to stop.
	if s := r.rec().Step; r.rec().Method == opsv1.MethodGate && (s == stepArm || s == stepArmed || s == stepAsk) {
		r.held = true
	}
	if rec := r.rec(); rec.Step == stepStop {
		r.up.stopBy(rec.StopBy)
	}
	r.claim.Drive(&r.up.kubelet)
}

// prepare pulls the image, checks it, takes the slot and stages the successor.
func (r *restart) prepare(ctx context.Context) error {
	limit := orElse(r.o.Upgrade().GetPrepareTimeout(), defaultPrepare)
	return r.withinPatience(ctx, r.o.CreateTime(), limit, func(ctx context.Context) error {
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
		return r.stage(ctx)
	})
}

// checkImage finds out whether the successor can be made here, and whether the image fits. If only kubelet can make it, the
// method is [MethodKubelet].
func (r *restart) checkImage(ctx context.Context) error {
	found, err := r.node.Resolve(ctx, r.o.Pod(), r.want, false)
	if err != nil {
		var out *outcome
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
		return failf(opsv1.ReasonImageUnchanged, "container %q has image %s in its spec already, and runs %s in "+
			"its place: revert that override instead", r.want.GetName(), was, o.Image)
	case was == r.change.want.GetImage():
		return r.sameName(ctx, config)
	case config.GetAnnotations()[criclone.AnnotationHash] != criclone.KubeletHash(config.GetMetadata().GetName(), was):
		r.toKubelet("kubelet's hash of the container is not that of its name and image, so it would not take over a container made here (is kubelet older than 1.31?)")
	}
	return nil
}

// sameName ends the preparation of the image that the container's spec has: there is nothing that kubelet would do. With pull policy Always
// the tag has just been resolved again, and who asks is told whether a restart would start something else. That is no failure.
func (r *restart) sameName(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	name := r.change.want.GetImage()
	if r.change.want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		return failf(opsv1.ReasonImageUnchanged, "container %q has image %s in its spec already: kubelet would "+
			"leave it as it is (restart it instead)", r.want.GetName(), name)
	}
	now, err := r.imageOnNode(ctx, name)
	if err != nil {
		return err
	}
	if now == nil {
		return failf(opsv1.ReasonPullFailed, "the runtime does not know %s, which has been pulled: was it removed "+
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
	out := &outcome{
		Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonImageUnchanged,
		Message: fmt.Sprintf("container %q has image %s in its spec already, and runs what that names now",
			r.want.GetName(), name),
	}
	if now.GetId() != runs {
		out.Reason = opsv1.ReasonImageMoved
		out.Message = fmt.Sprintf("container %q has image %s in its spec already, "+
			"which names another image now than the one that runs: a restart starts it", r.want.GetName(), name)
	}
	return out
}

// toKubelet has kubelet make the successor.
func (r *restart) toKubelet(format string, args ...any) {
	r.warn("only the image is put ready, kubelet makes the container: "+format, args...)
	r.setMethod(opsv1.MethodKubelet)
}

// leaveToKubelet waits for the commit of an upgrade of which only the image has been prepared.
func (r *restart) leaveToKubelet(ctx context.Context) error {
	// The next process needs not do it again.
	err := r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
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
	r.holdNext(ctx, orElse(r.o.Upgrade().GetHoldTimeout(), defaultHold))
	return nil
}

// dress makes the clone of the incumbent what kubelet will ask for once the pod's spec has the new image.
func (r *restart) dress(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	if err := r.useImage(ctx, c); err != nil {
		return err
	}
	c.Annotations[criclone.AnnotationHash] = criclone.KubeletHash(c.GetMetadata().GetName(), r.change.want.GetImage())
	return nil
}

// endOthers takes the rest of the upgrade back: a pod with one of two images new is what nobody asked for.
func (r *restart) endOthers() {
	c := r.container()
	if c.GetReason() == opsv1.ReasonCancelled {
		return
	}
	if err := r.o.Cancel(fmt.Sprintf("container %s: %s", c.GetName(), c.GetMessage())); err != nil {
		r.log.WithError(err).Info("the other containers of the upgrade go on")
	}
}
