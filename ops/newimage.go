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
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// newImage is what an operation that gives the container another image has of that.
type newImage struct {
	// want has the image, which is not known before the slot is taken if the restart goes back to that of the pod's spec.
	want *opsv1.ContainerUpgrade
	// image is the new image and old the incumbent's, as the runtime tells them; nil until they are known.
	image, old *runtimeapi.Image
	// before was the slot's override before this operation changed it, which it has if changed is set.
	before  *store.Override
	changed bool
}

// slot is the slot of the container.
func (r *Container) slot() interceptors.Slot { return r.handle.Slot() }

// withinPatience runs f until it is done, ctx ends, the operation is cancelled or the limit, which is counted from began, is over.
func (r *Container) withinPatience(ctx context.Context, began time.Time, limit time.Duration, f func(context.Context) error) error {
	ready, cancel := context.WithDeadline(ctx, began.Add(limit))
	defer cancel()
	call, end := crinode.EndWith(ready, r.op.Cancelled())
	defer end()
	err := f(call)
	var out *operation.Outcome
	switch {
	case err != nil && r.op.IsCancelled():
		return r.cancelledOutcome()
	case err != nil && !errors.As(err, &out) && ctx.Err() == nil && ready.Err() != nil:
		return operation.Failf(opsv1.ReasonPrepareTimeout, "not ready within %s, %s", limit, r.awaited())
	}
	return err
}

// awaited says what an operation that is not ready is at.
func (r *Container) awaited() string {
	if r.queued {
		return "waiting for the container, which " + orOther(r.node.Holder(r.slot())) + " has"
	}
	return "in phase " + operation.PhaseName(r.status().GetPhase())
}

func orOther(uid string) string {
	if uid == "" {
		return "another operation"
	}
	return "operation " + uid
}

func orElse(d *durationpb.Duration, otherwise time.Duration) time.Duration {
	if v := d.AsDuration(); v > 0 {
		return v
	}
	return otherwise
}

// pullImage gets the image of the change onto the node and pins it.
func (r *Container) pullImage(ctx context.Context) error {
	if r.change.want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER {
		return r.ensure(ctx, r.change.want)
	}
	return r.pull(ctx, r.change.want)
}

// pull gets an image onto the node and, if it is that of a change, pins it. Credentials that come meanwhile start the pull anew; what
// has been fetched counts.
func (r *Container) pull(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	pinFor := durationpb.New(orElse(r.op.Upgrade().GetPinFor(), defaultPin))
	if r.change == nil {
		pinFor = nil // as kubelet's own
	}
	r.show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_PULLING })
	for {
		credentials, forgotten, others := r.op.Credentials()
		r.failpoint("pulling")
		req := &opsv1.PullRequest{
			Uid: r.kind.Name() + "-" + operation.RandomToken(), Image: want.GetImage(), Policy: want.GetPullPolicy(), Credentials: credentials,
			PinFor: pinFor, Owner: r.pinOwner(),
		}
		if by, ok := ctx.Deadline(); ok {
			req.Deadline = durationpb.New(max(time.Second, time.Until(by)))
		}
		pull, end := crinode.EndWith(ctx, others)
		done, err := r.node.Images.Ensure(pull, req, func(p *opsv1.PullOperation) {
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(p) })
		})
		again := pull.Err() != nil && ctx.Err() == nil
		end()
		switch {
		case err == nil && done.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(done) })
			return nil
		case again:
			continue
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return operation.Failf(opsv1.ReasonPullFailed, "pulling %s: %v", want.GetImage(), err)
		case forgotten:
			r.log.WithField("reason", done.GetReason()).Info("waiting for the credentials, which were in the memory of the process before this one")
			r.show(func(c *opsv1.ContainerOperation) {
				c.Pull = briefly(done)
				c.Pull.Phase, c.Pull.Reason = opsv1.PullPhase_PULL_WAITING, opsv1.ReasonCredentialsNeeded
				c.Pull.Message = "cri-proxy was restarted and does not keep credentials: " +
					"waiting for the command to be repeated"
			})
			select {
			case <-others:
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			r.show(func(c *opsv1.ContainerOperation) { c.Pull = briefly(done) })
			return operation.Failf(opsv1.ReasonPullFailed, "pulling %s: %s: %s", want.GetImage(), done.GetReason(), done.GetMessage())
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

// pinOwner is whose pins the images get.
func (r *Container) pinOwner() string {
	if owner := r.op.Upgrade().GetOwner(); owner != "" {
		return owner
	}
	if requester := r.op.Requester(); requester != "" {
		return requester
	}
	return r.kind.Name() + " " + r.op.UID()
}

// pinPatience bounds the pinning of the old image: the slot is taken meanwhile.
const pinPatience = 10 * time.Second

// pinOld keeps the image that is replaced on the node, for the way back. The slot is taken: what is staged in it is not taken for
// what runs.
func (r *Container) pinOld(ctx context.Context, at *crinode.Target) {
	ctx, cancel := context.WithTimeout(ctx, pinPatience)
	defer cancel()
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: at.Incumbent})
	if err == nil {
		until := time.Now().Add(orElse(r.op.Upgrade().GetPinFor(), defaultPin))
		err = r.node.Images.Pin(ctx, st.GetStatus().GetImageRef(), r.pinOwner(), until)
	}
	if err != nil {
		r.warn("the old image is not pinned: %v", err)
	}
}

// noRequestError says why the request that made a container cannot be told.
type noRequestError struct{ err error }

func (e *noRequestError) Error() string { return e.err.Error() }
func (e *noRequestError) Unwrap() error { return e.err }

// fitImage returns the request that made the container, if the image can take the place of the one there.
//
// Errors: an *operation.Outcome, a *noRequestError, or the runtime's.
func (r *Container) fitImage(ctx context.Context, at *crinode.Target) (*runtimeapi.CreateContainerRequest, error) {
	want := r.change.want
	st, err := r.imageStatus(ctx, want.GetImage())
	if err != nil {
		return nil, err
	}
	request, err := r.node.RequestOf(ctx, at.Incumbent, at.Sandbox)
	if err != nil {
		return nil, &noRequestError{err}
	}
	return request, unfit(criclone.CheckImage(st, request, want))
}

// unfit makes an outcome of the error of a check of an image; nil of nil.
func unfit(err error) error {
	if err == nil {
		return nil
	}
	return operation.Failf(opsv1.ReasonImageUnfit, "%v", err)
}

// imageStatus is the verbose status of an image that is on the node.
func (r *Container) imageStatus(ctx context.Context, name string) (*runtimeapi.ImageStatusResponse, error) {
	st, err := r.node.ImageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}, Verbose: true})
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the image: %w", err)
	case st.GetImage() == nil:
		return nil, operation.Failf(opsv1.ReasonPullFailed, "the runtime does not know %s, which has been pulled: was it "+
			"removed meanwhile?", name)
	}
	return st, nil
}

// loadImages asks the runtime for both images, once. old is the ID of the incumbent's.
func (r *Container) loadImages(ctx context.Context, ref, old string) error {
	for ref, into := range map[string]**runtimeapi.Image{ref: &r.change.image, old: &r.change.old} {
		if *into != nil {
			continue
		}
		err := r.node.Retry(ctx, func() error {
			st, err := r.node.ImageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
			*into = st.GetImage()
			return err
		})
		if err != nil {
			return operation.Failf(opsv1.ReasonCreateFailed, "reading image %s: %v", ref, err)
		}
		if *into == nil && into == &r.change.image {
			return operation.Failf(opsv1.ReasonCreateFailed, "image %s is not on the node any more", ref)
		}
	}
	return nil
}

// prepareImage pulls the image of a restart with another one and takes the slot. What else is checked is so once the slot is taken.
func (r *Container) prepareImage(ctx context.Context) error {
	if r.spec.GetRevertImage() {
		return r.prepareRevert(ctx)
	}
	if err := r.withinPatience(ctx, time.Now(), defaultPrepare, r.pullImage); err != nil {
		return err
	}
	r.failpoint("pulled")
	return r.takeSlot(ctx)
}

// prepareRevert takes the slot once the image of the pod's spec is on the node.
func (r *Container) prepareRevert(ctx context.Context) error {
	for pulled := ""; ; {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
		o := r.node.Overrides.Of(r.slot())
		if o == nil {
			return notOverridden(r.spec.GetName())
		}
		r.change.want.Image = o.SpecImage
		r.show(func(c *opsv1.ContainerOperation) { c.Image = o.SpecImage })
		_, err := r.node.Resolve(ctx, r.op.Pod(), r.spec, r.op.Request().GetForce())
		if notRunning(err) || pulled == o.SpecImage {
			return nil
		}
		if r.spec.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
			if st, err := r.node.ImageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: o.SpecImage}}); err == nil && st.GetImage() != nil {
				return nil
			}
		}
		// Not while the slot is taken: kubelet could not make the container anew.
		r.claim.Release()
		r.claim = nil
		if err := r.withinPatience(ctx, time.Now(), defaultPrepare, r.pullImage); err != nil {
			return err
		}
		pulled = o.SpecImage
	}
}

func notOverridden(container string) error {
	return operation.Failf(opsv1.ReasonImageNotOverridden, "container %q has the image of the pod's spec: there is nothing "+
		"to revert", container)
}

func notRunning(err error) bool {
	var out *operation.Outcome
	return errors.As(err, &out) && out.Reason == opsv1.ReasonContainerNotRunning
}

// revertStopped ends the override of a container that does not run, and reports whether err, of staging its successor, is that: kubelet
// makes it, with the image of the pod's spec then.
func (r *Container) revertStopped(err error) bool {
	if !notRunning(err) || !r.spec.GetRevertImage() {
		return false
	}
	r.node.Overrides.Set(r.slot(), nil) // on disk with the end of the restart
	r.warn("the container does not run: kubelet makes it, by its own policy, and with the image of the pod's spec")
	return true
}

// planImage checks the image of a restart with another one and returns the override that it comes to; nil if it is the
// end of one. The slot is taken.
func (r *Container) planImage(ctx context.Context, at *crinode.Target) (*store.Override, error) {
	now := r.node.Overrides.Of(r.slot())
	if r.spec.GetRevertImage() {
		if now == nil {
			return nil, notOverridden(r.spec.GetName())
		}
		r.change.want.Image = now.SpecImage // a process before this one may have found another
	}
	request, err := r.fitImage(ctx, at)
	var none *noRequestError
	switch {
	case errors.As(err, &none):
		return nil, operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	case err != nil:
		return nil, err
	}
	name, config := r.change.want.GetImage(), request.GetConfig()
	runs := config.GetImage().GetUserSpecifiedImage()
	if err := r.loadImages(ctx, name, config.GetImage().GetImage()); err != nil {
		return nil, err
	}
	spec, nonRoot := now.SpecImageOf(runs), criclone.NonRootByImage(config, r.change.old)
	if now != nil && now.Stale(runs) {
		r.node.Overrides.Drop(now)
		now = nil
	}
	if now != nil {
		nonRoot = now.NonRoot
	}
	switch {
	case r.spec.GetRevertImage() && now == nil:
		return nil, notOverridden(r.spec.GetName())
	case r.spec.GetRevertImage():
		return nil, nil
	}
	r.pinOld(ctx, at)
	switch {
	case nonRoot && criclone.IsRoot(criclone.ImageUser(r.change.image)):
		return nil, operation.Failf(opsv1.ReasonImageUnfit, "image %s runs as root and that of the pod's spec does not: the "+
			"pod may insist on that, which this node cannot tell; change the pod's spec instead", name)
	case spec == "":
		return nil, operation.Failf(opsv1.ReasonCreateFailed, "kubelet does not tell which image the spec of container %q "+
			"has, so that an override could not last", r.spec.GetName())
	case now != nil && name == spec:
		return nil, operation.Failf(opsv1.ReasonImageUnchanged, "%s is the image of the pod's spec: revert the override instead", name)
	case name == runs && r.change.old.GetId() == r.change.image.GetId():
		return nil, operation.Failf(opsv1.ReasonImageUnchanged, "container %q has image %s already: leave the image out to "+
			"restart it", r.spec.GetName(), name)
	}
	pod := r.op.Pod()
	return &store.Override{
		PodUID: pod.GetUid(), Namespace: pod.GetNamespace(), Pod: pod.GetName(), Container: r.spec.GetName(),
		Image: name, ImageID: r.change.image.GetId(), SpecImage: spec, NonRoot: nonRoot,
		Since: time.Now(), Requester: r.op.Requester(), Operation: r.op.UID(),
	}, nil
}

// useImage makes the clone of the incumbent one of the new image. Its hash stays as it is: with that of the pod's spec kubelet is content.
func (r *Container) useImage(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	name, ref := r.change.want.GetImage(), r.change.want.GetImage()
	if o := r.rec().Override; o != nil {
		ref = o.ImageID // what the name meant then
	}
	if err := r.loadImages(ctx, ref, c.GetImage().GetImage()); err != nil {
		return err
	}
	criclone.SetImage(c, name, r.change.image.GetId())
	if r.change.want.RunAsUser == nil { // else it is the pod's and not the image's
		criclone.AdoptImageUser(c, r.change.old, r.change.image)
	}
	return nil
}

// keepOverride makes the image that of the slot from now on. It is on disk with the next step, which is the one that reveals the successor.
func (r *Container) keepOverride() {
	if r.change == nil || r.kind.Adopted() {
		return
	}
	r.change.before, r.change.changed = r.node.Overrides.Set(r.slot(), r.rec().Override), true
}

// undoOverride takes keepOverride back, on disk with the next step.
func (r *Container) undoOverride() {
	if r.change == nil || !r.change.changed {
		return
	}
	r.node.Overrides.Set(r.slot(), r.change.before)
	r.change.changed = false
}
