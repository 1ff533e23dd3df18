// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagechange

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// NotOverridden is the outcome of going back to the image of the pod's spec in a container that has
// that image.
func NotOverridden(container string) error {
	return operation.Failf(opsv1.ReasonImageNotOverridden, "container %q has the image of the pod's spec: "+
		"there is nothing to revert", container)
}

// NotRunning reports whether the error is the outcome of a container that does not run.
func NotRunning(err error) bool {
	var out *operation.Outcome
	return errors.As(err, &out) && out.Reason == opsv1.ReasonContainerNotRunning
}

// noRequestError says why the request that made a container cannot be told.
type noRequestError struct{ err error }

func (e *noRequestError) Error() string { return e.err.Error() }
func (e *noRequestError) Unwrap() error { return e.err }

// unfit makes an outcome of the error of a check of an image; nil of nil.
func unfit(err error) error {
	if err == nil {
		return nil
	}
	return operation.Failf(opsv1.ReasonImageUnfit, "%v", err)
}

// fit returns the request that made the container, if the image can take the place of the one
// there.
//
// Errors: an [*operation.Outcome], a *noRequestError, or the runtime's.
func (c *Change) fit(ctx context.Context, at *crinode.Target) (*runtimeapi.CreateContainerRequest, error) {
	st, err := c.node.inspect(ctx, c.want.GetImage())
	if err != nil {
		return nil, err
	}
	request, err := c.node.RequestOf(ctx, at.Incumbent, at.Sandbox)
	if err != nil {
		return nil, &noRequestError{err}
	}
	return request, unfit(criclone.CheckImage(st, request, c.want))
}

// CheckNext checks the image again with the request that would make the successor now.
func (c *Change) CheckNext(ctx context.Context, next *runtimeapi.CreateContainerRequest) error {
	var st *runtimeapi.ImageStatusResponse
	err := c.node.Runtime.Retry(ctx, func() (err error) {
		st, err = c.node.inspect(ctx, c.want.GetImage())
		return err
	})
	if err != nil {
		return err
	}
	return unfit(criclone.CheckImage(st, next, c.want))
}

// Repull pulls the image of an upgrade again if its policy is Always, and those of volumes. Its
// name may mean another one by now, whoever has pulled that.
func (c *Change) Repull(ctx context.Context) error {
	var err error
	if c.want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		err = c.Pull(ctx)
	}
	c.image = nil
	if err != nil {
		return err
	}
	return c.EnsureVolumes(ctx)
}

// RevertTo finds the image of the pod's spec, which the container goes back to. ready says that the
// image need not be pulled, as it has been if it is pulled. The slot is taken.
func (c *Change) RevertTo(ctx context.Context, pulled string) (image string, ready bool, err error) {
	o := c.node.Overrides.Of(c.slot())
	if o == nil {
		return "", false, NotOverridden(c.spec.GetName())
	}
	c.want.Image = o.SpecImage
	c.handle.Show(func(s *opsv1.ContainerOperation) { s.Image = o.SpecImage })
	if _, err := c.resolve(ctx); NotRunning(err) || pulled == o.SpecImage {
		return o.SpecImage, true, nil
	}
	if c.spec.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		st, err := c.node.Service.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{
			Image: &runtimeapi.ImageSpec{Image: o.SpecImage},
		})
		ready = err == nil && st.GetImage() != nil
	}
	return o.SpecImage, ready, nil
}

// RevertStopped ends the override of a container that does not run, and reports whether err, of
// staging its successor, is that: kubelet makes it, with the image of the pod's spec then.
func (c *Change) RevertStopped(err error) bool {
	if !NotRunning(err) || !c.spec.GetRevertImage() {
		return false
	}
	c.node.Overrides.Set(c.slot(), nil) // on disk with the end of the restart
	c.c.Warn("the container does not run: kubelet makes it, by its own policy, and with the image of the pod's spec")
	return true
}

// Plan checks the image of a restart with another one and returns the override that it comes to;
// nil if it is the end of one, or if the operation makes none. The slot is taken.
func (c *Change) Plan(ctx context.Context, at *crinode.Target) (*store.Override, error) {
	if c.want == nil || c.isUpgrade() {
		return nil, nil
	}
	now := c.node.Overrides.Of(c.slot())
	if c.spec.GetRevertImage() {
		if now == nil {
			return nil, NotOverridden(c.spec.GetName())
		}
		c.want.Image = now.SpecImage // a process before this one may have found another
	}
	request, err := c.fit(ctx, at)
	var none *noRequestError
	switch {
	case errors.As(err, &none):
		return nil, operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	case err != nil:
		return nil, err
	}
	name, config := c.want.GetImage(), request.GetConfig()
	runs := config.GetImage().GetUserSpecifiedImage()
	if err := c.loadImages(ctx, name, config.GetImage().GetImage()); err != nil {
		return nil, err
	}
	spec, nonRoot := now.SpecImageOf(runs), criclone.NonRootByImage(config, c.old)
	if now != nil && now.Stale(runs) {
		c.node.Overrides.Drop(now)
		now = nil
	}
	if now != nil {
		nonRoot = now.NonRoot
	}
	switch {
	case c.spec.GetRevertImage() && now == nil:
		return nil, NotOverridden(c.spec.GetName())
	case c.spec.GetRevertImage():
		return nil, nil
	}
	c.pinOld(ctx, at)
	switch {
	case nonRoot && criclone.IsRoot(criclone.ImageUser(c.image)):
		return nil, operation.Failf(opsv1.ReasonImageUnfit,
			"image %s runs as root and that of the pod's spec does not: the "+
				"pod may insist on that, which this node cannot tell; change the pod's spec instead", name)
	case spec == "":
		return nil, operation.Failf(opsv1.ReasonCreateFailed,
			"kubelet does not tell which image the spec of container %q "+
				"has, so that an override could not last", c.spec.GetName())
	case now != nil && name == spec:
		return nil, operation.Failf(opsv1.ReasonImageUnchanged,
			"%s is the image of the pod's spec: revert the override "+
				"instead", name)
	case name == runs && c.old.GetId() == c.image.GetId():
		return nil, operation.Failf(opsv1.ReasonImageUnchanged,
			"container %q has image %s already: leave the image out to "+
				"restart it", c.spec.GetName(), name)
	}
	pod := c.c.Operation.Pod()
	return &store.Override{
		PodUID: pod.GetUid(), Namespace: pod.GetNamespace(), Pod: pod.GetName(), Container: c.spec.GetName(),
		Image: name, ImageID: c.image.GetId(), SpecImage: spec, NonRoot: nonRoot,
		Since: time.Now(), Requester: c.c.Operation.Requester(), Operation: c.c.Operation.UID(),
	}, nil
}

// CheckUpgrade finds out whether the successor of an upgrade can be made here, and whether the
// image fits. onlyKubelet says why only kubelet can make it; empty if it can be made here.
func (c *Change) CheckUpgrade(ctx context.Context) (onlyKubelet string, err error) {
	found, err := c.node.Runtime.Resolve(ctx, c.c.Operation.Pod(), c.spec, false)
	if err != nil {
		var out *operation.Outcome
		if errors.As(err, &out) {
			return "", out
		}
		return "", fmt.Errorf("finding the container: %w", err)
	}
	c.pinOld(ctx, found)
	request, err := c.fit(ctx, found)
	var none *noRequestError
	switch {
	case errors.As(err, &none):
		return err.Error(), nil
	case err != nil:
		return "", err
	}
	config := request.GetConfig()
	o, runs := c.node.Overrides.Of(c.slot()), config.GetImage().GetUserSpecifiedImage()
	was := o.SpecImageOf(runs)
	switch {
	case was != runs && was == c.want.GetImage():
		return "", operation.Failf(opsv1.ReasonImageUnchanged, "container %q has image %s in its spec already, "+
			"and runs %s in its place: revert that override instead", c.spec.GetName(), was, o.Image)
	case was == c.want.GetImage():
		return "", c.sameName(ctx, config)
	case config.GetAnnotations()[criclone.AnnotationHash] != criclone.KubeletHash(config.GetMetadata().GetName(), was):
		return "kubelet's hash of the container is not that of its name and image, so it would not take over a " +
			"container " +
			"made here (is kubelet older than 1.31?)", nil
	}
	return "", nil
}

// sameName ends the preparation of the image that the container's spec has: there is nothing that
// kubelet would do. With pull policy Always the tag has just been resolved again, and who asks is
// told whether a restart would start something else. That is no failure.
func (c *Change) sameName(ctx context.Context, config *runtimeapi.ContainerConfig) error {
	name := c.want.GetImage()
	if c.want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		return operation.Failf(opsv1.ReasonImageUnchanged,
			"container %q has image %s in its spec already: kubelet would "+
				"leave it as it is (restart it instead)", c.spec.GetName(), name)
	}
	now, err := c.node.find(ctx, name)
	if err != nil {
		return err
	}
	if now == nil {
		return operation.Failf(opsv1.ReasonPullFailed,
			"the runtime does not know %s, which has been pulled: was it removed "+
				"meanwhile?", name)
	}
	runs := config.GetImage().GetImage()
	old, err := c.node.find(ctx, runs)
	if err != nil {
		return err
	}
	if old != nil {
		runs = old.GetId()
	}
	out := &operation.Outcome{
		Phase: opsv1.Phase_PHASE_CANCELLED, Reason: opsv1.ReasonImageUnchanged,
		Message: fmt.Sprintf("container %q has image %s in its spec already, and runs what that names now",
			c.spec.GetName(), name),
	}
	if now.GetId() != runs {
		out.Reason = opsv1.ReasonImageMoved
		out.Message = fmt.Sprintf("container %q has image %s in its spec already, "+
			"which names another image now than the one that runs: a restart starts it", c.spec.GetName(), name)
	}
	return out
}
