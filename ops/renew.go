// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/environment"
)

// Reasons of operations whose container kubelet could not start again either.
const (
	// ReasonConfig is kubelet's word for what the pod's spec names and is not there.
	ReasonConfig = "CreateContainerConfigError"
	// ReasonNeverPull is kubelet's word for an absent image with imagePullPolicy Never.
	ReasonNeverPull = "ErrImageNeverPull"
	// ReasonEnvironmentLost is for a command that must be repeated.
	ReasonEnvironmentLost = "EnvironmentLost"
)

// renew puts into the config of the successor, which is that of the incumbent, what kubelet would compute anew.
func (r *restart) renew(c *runtimeapi.ContainerConfig) error {
	env, lost := r.Engine.environment(r.o, r.want.GetName())
	podDir := environment.PodDir(c, r.o.op.GetPod().GetUid()) // pods never change
	var err error
	switch {
	case lost:
		return failf(ReasonEnvironmentLost, "cri-proxy has been restarted and the environment that the command brought is lost, with the file of records: repeat the command with another UID")
	case env != nil:
		err = environment.Apply(c, env, podDir)
	default:
		err = environment.Refresh(c, podDir, nil)
	}
	if err != nil {
		return failf(ReasonConfig, "kubelet could not start container %q again (%s): %v", r.want.GetName(), ReasonConfig, err)
	}
	return nil
}

// nextRequest is the request that makes the successor: that of the incumbent, with what kubelet would compute anew, and with
// the image that the operation is for.
func (r *restart) nextRequest(ctx context.Context, token string) (*runtimeapi.CreateContainerRequest, error) {
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	r.update()
	req, err := cloneFor(r.request, r.applied, r.container().GetAttempt(), token)
	if err != nil {
		return nil, failf(ReasonCreateFailed, "%v", err)
	}
	if err := r.renew(req.GetConfig()); err != nil {
		return nil, err
	}
	switch {
	case r.up != nil:
		err = r.dress(ctx, req.GetConfig())
	case r.change != nil:
		err = r.useImage(ctx, req.GetConfig())
	default:
		err = r.specImage(ctx, req.GetConfig())
	}
	if err != nil {
		return nil, err
	}
	return req, nil
}

// ensureImage makes sure of the image of the pod's spec as kubelet does before each start (image_manager.go
// EnsureImageExists), before the slot is taken: a pull may take long.
func (r *restart) ensureImage(ctx context.Context) error {
	if r.images == nil || r.overrides.of(r.slot()) != nil {
		return nil
	}
	if err := r.awaitRuntime(ctx); err != nil {
		return err
	}
	// What cannot be found is said when the slot is taken.
	found, err := r.resolve(ctx, r.o.op.GetPod(), r.want, r.o.req.GetForce())
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	request, err := r.requestOf(ctx, found.incumbent, found.sandbox)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	want := &opsv1.ContainerUpgrade{Name: r.want.GetName(), Image: request.GetConfig().GetImage().GetUserSpecifiedImage(), PullPolicy: r.want.GetPullPolicy()}
	if want.GetImage() == "" {
		return nil // an old kubelet does not tell
	}
	return r.withinPatience(ctx, r.o.op.GetCreateTime().AsTime(), defaultPrepare, func(ctx context.Context) error {
		return r.ensure(ctx, want)
	})
}

// ensure has the image on the node, by the container's policy.
func (r *restart) ensure(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	if want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		image, err := r.imageOnNode(ctx, want.GetImage())
		switch {
		case err != nil:
			return err
		case image != nil:
			return nil
		case want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER:
			return failf(ReasonNeverPull, "Container image %q is not present with pull policy of Never", want.GetImage())
		}
	}
	return r.pull(ctx, want)
}

// imageOnNode returns what the runtime knows of an image; nil if the node has none of that name.
func (r *restart) imageOnNode(ctx context.Context, name string) (image *runtimeapi.Image, err error) {
	err = r.patiently(ctx, func() error {
		st, err := r.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		image = st.GetImage()
		return err
	})
	if err != nil {
		return nil, failf(ReasonRuntime, "reading image %s: %v", name, err)
	}
	return image, nil
}

// specImage gives the successor of a plain restart what the image of the pod's spec means on this node now: a tag may
// have moved since the incumbent's start.
func (r *restart) specImage(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	name := c.GetImage().GetUserSpecifiedImage()
	if r.images == nil || name == "" || r.overrides.of(r.slot()) != nil {
		return nil
	}
	now, err := r.imageOnNode(ctx, name)
	switch {
	case err != nil:
		return err
	case now == nil:
		return failf(ReasonPullFailed, "image %s is not on the node any more: was it removed just now?", name)
	case now.GetId() == c.GetImage().GetImage():
		return nil
	}
	old, err := r.imageOnNode(ctx, c.GetImage().GetImage())
	if err != nil {
		return err
	}
	if uid, username := imageUser(now); nonRootByImage(c, old) && isRoot(uid, username) {
		return failf(ReasonImageUnfit, "image %s has moved to one that runs as root, and the one that runs does not: the pod may insist on that, which this node cannot tell; delete the pod to have kubelet decide", name)
	}
	r.log.WithField("image", now.GetId()).Info("the image of the pod's spec is another one by now")
	setImage(c, name, now.GetId())
	adoptImageUser(c, old, now)
	return nil
}

// renewStaged makes the staged successor of an upgrade anew if it is not what kubelet would make now: an upgrade
// may have waited for its commit for long.
func (r *restart) renewStaged(ctx context.Context) error {
	if r.change.want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		if err := r.pullImage(ctx); err != nil {
			return err
		}
		r.change.image = nil // it may be another one
	}
	rec := r.rec()
	next, err := r.nextRequest(ctx, rec.Token)
	if err != nil {
		return err
	}
	ours := r.records.request(rec.Successor)
	if ours != nil && len(differs(ours, next)) == 0 {
		return nil
	}
	if ours != nil {
		r.log.WithField("differing", differs(ours, next)).Info("what kubelet would make has changed since the preparation")
	}
	return r.stageAnew(ctx, "")
}

// isCertain reports whether the successor of an upgrade is known to be what kubelet will ask for. If not, it
// begins only when kubelet has asked.
func (r *restart) isCertain() bool {
	if r.up == nil {
		return true
	}
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	return r.o.certain[r.want.GetName()] || r.o.containers[r.i].Asked
}

// sameMounts gives ours the host paths of asked where both lead to the same file: kubelet binds a part of a volume
// in a directory of its own, and the successor may have it from the volume itself.
func sameMounts(ours, asked *runtimeapi.CreateContainerRequest) *runtimeapi.CreateContainerRequest {
	paths := map[string]string{}
	for _, m := range asked.GetConfig().GetMounts() {
		paths[m.GetContainerPath()] = m.GetHostPath()
	}
	ours = proto.Clone(ours).(*runtimeapi.CreateContainerRequest)
	for _, m := range ours.GetConfig().GetMounts() {
		if path := paths[m.GetContainerPath()]; path != "" && path != m.GetHostPath() && environment.SameFile(path, m.GetHostPath()) {
			m.HostPath = path
		}
	}
	return ours
}
