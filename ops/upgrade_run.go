// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Reasons of upgrades that did not succeed, beside those of restarts.
const (
	ReasonPullFailed     = "PullFailed"
	ReasonPrepareTimeout = "PrepareTimeout"
	ReasonHoldTimeout    = "HoldTimeout"
	ReasonSameImage      = "ImageUnchanged"
	ReasonOther          = "OtherContainerFailed"
)

// upgrade is what a restart that is an upgrade has beyond that.
type upgrade struct {
	want *opsv1.ContainerUpgrade
	kubelet
	// image is the new image and old the incumbent's, as the runtime tells them; nil until they are known.
	image, old *runtimeapi.Image
	// pending are kubelet's stops that wait for the successor, and asked its creation that has come before that.
	pending []stopped
	asked   *created
	// revealed is set once kubelet may have seen the successor.
	revealed bool
}

func newUpgrade(want *opsv1.ContainerUpgrade) *upgrade {
	return &upgrade{want: want, kubelet: newKubelet()}
}

// driveUpgrade is drive for an upgrade: everything that takes time is done before kubelet is involved, and what
// stops the incumbent is kubelet's own StopContainer.
func (r *restart) driveUpgrade(ctx context.Context) error {
	if r.claim != nil {
		r.drives()
		if err := r.resume(ctx); err != nil {
			return err
		}
	}
	for {
		var err error
		switch s := r.rec().Step; s {
		case stepNone:
			err = r.prepare(ctx)
			if err == nil && r.rec().Method == MethodKubelet {
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
		case stepStarted:
			err = r.showSuccessor(ctx)
		case stepReveal:
			return r.awaitAdoption(ctx)
		default:
			return failf(ReasonJournal, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

// drives lets kubelet drive.
func (r *restart) drives() {
	switch r.rec().Step {
	case stepArmed, stepStop, stepStarted, stepReveal:
		r.up.listen(true)
	}
	// What waited at its gate in the process before this one waits still, and needs no time to stop.
	if s := r.rec().Step; r.rec().Method == MethodGate && (s == stepArm || s == stepArmed) {
		r.held = true
	}
	r.up.done = r.claim.Done()
	r.claim.Drive(&r.up.kubelet)
}

// prepare pulls the image, checks it, takes the slot and stages the successor.
func (r *restart) prepare(ctx context.Context) error {
	limit := orElse(r.o.upgrade.GetPrepareTimeout(), defaultPrepare)
	ready, cancel := context.WithDeadline(ctx, r.o.op.GetCreateTime().AsTime().Add(limit)) // never changes
	defer cancel()
	err := r.prepareWithin(ready)
	var out *outcome
	if err != nil && !errors.As(err, &out) && ctx.Err() == nil && ready.Err() != nil {
		return failf(ReasonPrepareTimeout, "not ready within %s, in phase %s", limit, phaseName(r.container().GetPhase()))
	}
	return err
}

func (r *restart) prepareWithin(ctx context.Context) error {
	ctx, end := endWith(ctx, r.o.cancelled)
	defer end()
	err := r.pullImage(ctx)
	if err == nil {
		err = r.checkImage(ctx)
	}
	if err == nil && r.rec().Method != MethodKubelet && r.claim == nil {
		if err = r.takeSlot(ctx); err == nil {
			r.drives()
		}
	}
	if err == nil && r.rec().Method != MethodKubelet {
		err = r.stage(ctx)
	}
	if err != nil && r.isCancelled() {
		return r.cancelledOutcome()
	}
	return err
}

func (r *restart) isCancelled() bool {
	select {
	case <-r.o.cancelled:
		return true
	default:
		return false
	}
}

func orElse(d *durationpb.Duration, otherwise time.Duration) time.Duration {
	if v := d.AsDuration(); v > 0 {
		return v
	}
	return otherwise
}

// pullImage gets the image onto the node and pins it. Credentials that come meanwhile start the pull anew; what has been fetched counts.
func (r *restart) pullImage(ctx context.Context) error {
	r.show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_PULLING })
	owner := r.o.upgrade.GetOwner()
	if owner == "" {
		owner = r.o.op.GetRequester()
	}
	if owner == "" {
		owner = "upgrade " + r.o.op.GetUid()
	}
	for {
		credentials, others := r.o.given()
		req := &opsv1.PullRequest{
			Uid: "upgrade-" + randomToken(), Image: r.up.want.GetImage(), Policy: r.up.want.GetPullPolicy(), Credentials: credentials,
			PinFor: durationpb.New(orElse(r.o.upgrade.GetPinFor(), defaultPin)), Owner: owner,
		}
		if by, ok := ctx.Deadline(); ok {
			req.Deadline = durationpb.New(max(time.Second, time.Until(by)))
		}
		pull, end := endWith(ctx, others)
		done, err := r.images.Ensure(pull, req, func(p *opsv1.PullOperation) {
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(p) })
		})
		again := pull.Err() != nil && ctx.Err() == nil
		end()
		switch {
		case err == nil && done.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(done) })
			r.pinOld(ctx, owner)
			return nil
		case again:
			continue
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return failf(ReasonPullFailed, "pulling %s: %v", r.up.want.GetImage(), err)
		default:
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(done) })
			return failf(ReasonPullFailed, "pulling %s: %s: %s", r.up.want.GetImage(), done.GetReason(), done.GetMessage())
		}
	}
}

// briefly is what an operation tells of its pull.
func briefly(p *opsv1.PullOperation) *opsv1.PullOperation {
	return &opsv1.PullOperation{
		Phase: p.GetPhase(), Reason: p.GetReason(), Message: p.GetMessage(), ImageId: p.GetImageId(),
		BytesDone: p.GetBytesDone(), BytesTotal: p.GetBytesTotal(), BytesFetched: p.GetBytesFetched(), BytesPerSecond: p.GetBytesPerSecond(),
	}
}

// pinOld keeps the image that is replaced on the node, for the way back.
func (r *restart) pinOld(ctx context.Context, owner string) {
	found, err := r.resolve(ctx, r.o.op.GetPod(), r.want, false)
	if err != nil {
		return // checkImage says why
	}
	st, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: found.incumbent})
	if err == nil {
		err = r.images.Pin(ctx, st.GetStatus().GetImageRef(), owner, time.Now().Add(orElse(r.o.upgrade.GetPinFor(), defaultPin)))
	}
	if err != nil {
		r.warn("the old image is not pinned: %v", err)
	}
}

// checkImage finds out whether the successor can be made here, and whether the image fits. If only kubelet can make it, the
// method is [MethodKubelet].
func (r *restart) checkImage(ctx context.Context) error {
	found, err := r.resolve(ctx, r.o.op.GetPod(), r.want, false)
	if err != nil {
		var out *outcome
		if errors.As(err, &out) {
			return out
		}
		return fmt.Errorf("finding the container: %w", err)
	}
	st, err := r.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: r.up.want.GetImage()}, Verbose: true})
	switch {
	case err != nil:
		return fmt.Errorf("reading the image: %w", err)
	case st.GetImage() == nil:
		return failf(ReasonPullFailed, "the runtime does not know %s, which has been pulled: was it removed meanwhile?", r.up.want.GetImage())
	}
	request, _, err := r.requestOf(ctx, found.incumbent, found.sandbox)
	if err != nil {
		r.toKubelet("%v", err)
		return nil
	}
	if err := imageFits(st, request, r.up.want); err != nil {
		return err
	}
	config := request.GetConfig()
	was := config.GetImage().GetUserSpecifiedImage()
	switch {
	case was == r.up.want.GetImage():
		return failf(ReasonSameImage, "container %q has image %s in its spec already: kubelet would leave it as it is (restart it instead)", r.want.GetName(), was)
	case config.GetAnnotations()[annotationHash] != kubeletHash(config.GetMetadata().GetName(), was):
		r.toKubelet("kubelet's hash of the container is not that of its name and image, so it would not take over a container made here (is kubelet older than 1.31?)")
	}
	return nil
}

// toKubelet has kubelet make the successor.
func (r *restart) toKubelet(format string, args ...any) {
	r.warn("only the image is put ready, kubelet makes the container: "+format, args...)
	r.setMethod(MethodKubelet)
}

// leaveToKubelet waits for the commit of an upgrade of which only the image has been prepared.
func (r *restart) leaveToKubelet(ctx context.Context) error {
	r.show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_PREPARED })
	limit := orElse(r.o.upgrade.GetHoldTimeout(), defaultHold)
	hold := time.NewTimer(limit)
	defer hold.Stop()
	select {
	case <-r.o.released:
		return nil
	case <-r.o.cancelled:
		return r.cancelledOutcome()
	case <-hold.C:
		return failf(ReasonHoldTimeout, "not committed within %s", limit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dress makes the clone of the incumbent what kubelet will ask for once the pod's spec has the new image.
func (r *restart) dress(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	if err := r.loadImages(ctx, c.GetImage().GetImage()); err != nil {
		return err
	}
	c.Image.Image, c.Image.UserSpecifiedImage = r.up.image.GetId(), r.up.want.GetImage()
	c.Annotations[annotationHash] = kubeletHash(c.GetMetadata().GetName(), r.up.want.GetImage())
	if r.up.want.RunAsUser == nil { // else it is the pod's and not the image's
		adoptImageUser(c, r.up.old, r.up.image)
	}
	return nil
}

// loadImages asks the runtime for both images, once. old is the ID of the incumbent's.
func (r *restart) loadImages(ctx context.Context, old string) error {
	for ref, into := range map[string]**runtimeapi.Image{r.up.want.GetImage(): &r.up.image, old: &r.up.old} {
		if *into != nil {
			continue
		}
		err := r.patiently(ctx, func() error {
			st, err := r.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
			*into = st.GetImage()
			return err
		})
		if err != nil {
			return failf(ReasonCreateFailed, "reading image %s: %v", ref, err)
		}
		if *into == nil && into == &r.up.image {
			return failf(ReasonCreateFailed, "image %s is not on the node any more", ref)
		}
	}
	return nil
}

// endOthers takes the rest of the upgrade back: a pod with one of two images new is what nobody asked for.
func (r *restart) endOthers() {
	c := r.container()
	if c.GetReason() == ReasonCancelled {
		return
	}
	if err := r.cancel(r.o, fmt.Sprintf("container %s: %s", c.GetName(), c.GetMessage())); err != nil {
		r.log.WithError(err).Info("the other containers of the upgrade go on")
	}
}
