// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/environment"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// renew puts into the config of the successor, which is that of the incumbent, what kubelet would compute anew.
func (s *stager) renew(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	env, lost := s.c.op.Environment(s.c.spec.GetName())
	podDir := environment.PodDir(c, s.c.op.Pod().GetUid())
	var parts environment.Parts
	var err error
	switch {
	case lost:
		return operation.Failf(opsv1.ReasonEnvironmentLost, "cri-proxy has been restarted and the environment that the "+
			"command brought is lost, with the file of records: repeat the command with another UID")
	case env != nil:
		parts, err = environment.Apply(c, env, podDir)
	default:
		parts, err = environment.Refresh(c, podDir, nil)
	}
	if err != nil {
		return operation.Failf(opsv1.ReasonCreateContainerConfigError, "kubelet could not start container %q again (%s): %v",
			s.c.spec.GetName(), opsv1.ReasonCreateContainerConfigError, err)
	}
	if err := parts.Note(c); err != nil {
		return operation.Failf(opsv1.ReasonInternalError, "%v", err)
	}
	return s.c.volumeImages(ctx, c, env)
}

// checkParts finds out, while the successor waits at its gate, whether what was mounted in it by a path that others can change is what was
// meant. If not, it must not run.
func (s *stager) checkParts(ctx context.Context, rec store.Container) error {
	var st *runtimeapi.ContainerStatus
	err := s.c.node.Retry(ctx, func() (err error) {
		st, _, err = s.c.node.Inspect(ctx, rec.Successor)
		return err
	})
	parts := environment.PartsOf(st.GetAnnotations())
	if err == nil && len(parts) == 0 {
		return nil
	}
	if err == nil && s.c.switcher.pid == 0 {
		err = errors.New("the process that waits at its gate cannot be looked at")
	}
	if err == nil {
		err = parts.Check(st.GetMounts(), s.c.switcher.pid)
	}
	if err != nil {
		return operation.Failf(opsv1.ReasonCreateContainerConfigError, "the mounts of the new container are not certain to "+
			"be in their volumes: %v", err)
	}
	return nil
}

// needsGate refuses a successor with such mounts that would run at once.
func (s *stager) needsGate(req *runtimeapi.CreateContainerRequest) error {
	if len(environment.PartsOf(req.GetConfig().GetAnnotations())) == 0 || s.c.rec().Method == opsv1.MethodGate {
		return nil
	}
	return operation.Failf(opsv1.ReasonCreateContainerConfigError, "a part of a volume (subPath) was replaced since kubelet "+
		"mounted it, and without a gate it cannot be mounted safely: delete the pod, or let its process end")
}

// volumeImages gives the mounts of volumes of type image what their references mean on this node now.
func (r *Container) volumeImages(ctx context.Context, c *runtimeapi.ContainerConfig, env *opsv1.Environment) error {
	if r.node.Images == nil {
		return nil
	}
	for _, v := range env.GetImageVolumes() {
		i := slices.IndexFunc(c.GetMounts(), func(m *runtimeapi.Mount) bool { return m.GetContainerPath() == v.GetContainerPath() })
		if i < 0 || c.Mounts[i].GetImage() == nil {
			continue
		}
		now, err := r.imageOnNode(ctx, v.GetReference())
		switch {
		case err != nil:
			return err
		case now == nil:
			return operation.Failf(opsv1.ReasonPullFailed, "image %s of the volume at %s is not on the node any more: was it "+
				"removed just now?", v.GetReference(), v.GetContainerPath())
		}
		c.Mounts[i].Image.Image = now.GetId()
	}
	return nil
}

// ensureVolumes makes sure of the images of volumes, as kubelet does before each start (kuberuntime_manager.go getImageVolumes).
func (r *Container) ensureVolumes(ctx context.Context) error {
	env, _ := r.op.Environment(r.spec.GetName())
	if r.node.Images == nil {
		return nil
	}
	for _, v := range env.GetImageVolumes() {
		if err := r.ensure(ctx, &opsv1.ContainerUpgrade{Name: r.spec.GetName(), Image: v.GetReference(), PullPolicy: v.GetPullPolicy()}); err != nil {
			return err
		}
	}
	return nil
}

// nextRequest is the request that makes the successor: that of the incumbent, with what kubelet would compute anew, and with
// the image that the operation is for.
func (s *stager) nextRequest(ctx context.Context, token string) (*runtimeapi.CreateContainerRequest, error) {
	if err := s.c.old.load(ctx); err != nil {
		return nil, err
	}
	s.c.old.update()
	req, err := criclone.Clone(s.c.old.request, s.c.old.applied, s.c.status().GetAttempt(), token)
	if err != nil {
		return nil, operation.Failf(opsv1.ReasonCreateFailed, "%v", err)
	}
	if err := s.renew(ctx, req.GetConfig()); err != nil {
		return nil, err
	}
	switch {
	case s.c.change != nil:
		err = s.c.useImage(ctx, req.GetConfig())
		if err == nil && s.c.kind.Adopted() { // kubelet will ask for it once the pod's spec has the new image
			name := req.GetConfig().GetMetadata().GetName()
			req.Config.Annotations[criclone.AnnotationHash] = criclone.KubeletHash(name, s.c.change.want.GetImage())
		}
	default:
		err = s.c.specImage(ctx, req.GetConfig())
	}
	if err != nil {
		return nil, err
	}
	return req, nil
}

// ensureImage makes sure of the image of the pod's spec as kubelet does before each start (image_manager.go
// EnsureImageExists), before the slot is taken: a pull may take long.
func (r *Container) ensureImage(ctx context.Context) error {
	if r.node.Images == nil || r.node.Overrides.Of(r.slot()) != nil {
		return nil
	}
	if err := r.node.AwaitRuntime(ctx); err != nil {
		return err
	}
	// What cannot be found is said when the slot is taken.
	found, err := r.node.Resolve(ctx, r.op.Pod(), r.spec, r.op.Request().GetForce())
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	request, err := r.node.RequestOf(ctx, found.Incumbent, found.Sandbox)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	want := &opsv1.ContainerUpgrade{Name: r.spec.GetName(), Image: request.GetConfig().GetImage().GetUserSpecifiedImage(), PullPolicy: r.spec.GetPullPolicy()}
	return r.withinPatience(ctx, r.op.CreateTime(), defaultPrepare, func(ctx context.Context) error {
		if want.GetImage() != "" { // else kubelet is an old one that does not tell
			if err := r.ensure(ctx, want); err != nil {
				return err
			}
		}
		return r.ensureVolumes(ctx)
	})
}

// ensure has the image on the node, by the container's policy.
func (r *Container) ensure(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	if want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		image, err := r.imageOnNode(ctx, want.GetImage())
		switch {
		case err != nil:
			return err
		case image != nil:
			return nil
		case want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER:
			return operation.Failf(opsv1.ReasonErrImageNeverPull, "Container image %q is not present with pull policy of "+
				"Never", want.GetImage())
		}
	}
	return r.pull(ctx, want)
}

// imageOnNode returns what the runtime knows of an image; nil if the node has none of that name.
func (r *Container) imageOnNode(ctx context.Context, name string) (image *runtimeapi.Image, err error) {
	err = r.node.Retry(ctx, func() error {
		st, err := r.node.ImageService.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		image = st.GetImage()
		return err
	})
	if err != nil {
		return nil, operation.Failf(opsv1.ReasonRuntimeError, "reading image %s: %v", name, err)
	}
	return image, nil
}

// specImage gives the successor of a plain restart what the image of the pod's spec means on this node now: a tag may
// have moved since the incumbent's start.
func (r *Container) specImage(ctx context.Context, c *runtimeapi.ContainerConfig) error {
	name := c.GetImage().GetUserSpecifiedImage()
	if r.node.Images == nil || name == "" || r.node.Overrides.Of(r.slot()) != nil {
		return nil
	}
	now, err := r.imageOnNode(ctx, name)
	switch {
	case err != nil:
		return err
	case now == nil:
		return operation.Failf(opsv1.ReasonPullFailed, "image %s is not on the node any more: was it removed just now?", name)
	case now.GetId() == c.GetImage().GetImage():
		return nil
	}
	old, err := r.imageOnNode(ctx, c.GetImage().GetImage())
	if err != nil {
		return err
	}
	// Who sends an environment knows the pod, and has said what that demands of the user; else only the container can tell.
	env, _ := r.op.Environment(r.spec.GetName())
	if env != nil {
		err := unfit(criclone.CheckNonRoot(now, &opsv1.ContainerUpgrade{Name: r.spec.GetName(), Image: name, RunAsNonRoot: r.spec.GetRunAsNonRoot(), RunAsUser: r.spec.RunAsUser}))
		if err != nil {
			return err
		}
	} else if uid, username := criclone.ImageUser(now); criclone.NonRootByImage(c, old) && criclone.IsRoot(uid, username) {
		return operation.Failf(opsv1.ReasonImageUnfit, "image %s has moved to one that runs as root, and the one that runs "+
			"does not: the pod may insist on that, which this node cannot tell; delete the pod to have kubelet "+
			"decide", name)
	}
	r.log.WithField("image", now.GetId()).Info("the image of the pod's spec is another one by now")
	criclone.SetImage(c, name, now.GetId())
	if env == nil || r.spec.RunAsUser == nil {
		criclone.AdoptImageUser(c, old, now)
	}
	return nil
}

// renewStaged makes the staged successor of an upgrade anew if it is not what kubelet would make now: an upgrade
// may have waited for its commit for long.
func (r *Container) renewStaged(ctx context.Context) error {
	pull, end := crinode.EndWith(ctx, r.claim.Yielded())
	pull, endToo := crinode.EndWith(pull, r.op.Cancelled())
	var err error
	if r.change.want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		err = r.pullImage(pull)
	}
	r.change.image = nil // the name may mean another one by now, whoever has pulled that
	if err == nil {
		err = r.ensureVolumes(pull)
	}
	endToo()
	end()
	if gone := r.interrupted(); gone != nil {
		return gone
	}
	if err != nil {
		return err
	}
	rec := r.rec()
	next, err := r.stager.nextRequest(ctx, rec.Token)
	if err != nil {
		return err
	}
	var image *runtimeapi.ImageStatusResponse
	err = r.node.Retry(ctx, func() (err error) {
		image, err = r.imageStatus(ctx, r.change.want.GetImage())
		return err
	})
	if err == nil {
		err = unfit(criclone.CheckImage(image, next, r.change.want))
	}
	if err != nil {
		return err
	}
	ours := r.node.Records.Request(rec.Successor)
	if ours != nil && len(criclone.Diff(ours, next)) == 0 {
		return nil
	}
	if ours != nil {
		r.log.WithField("differing", criclone.Diff(ours, next)).Info("what kubelet would make has changed since the preparation")
	}
	return r.stager.stageAnew(ctx, "")
}

// isCertain reports whether the successor of an upgrade is known to be what kubelet will ask for. If not, it
// begins only when kubelet has asked.
func (r *Container) isCertain() bool {
	return !r.kind.Adopted() || r.handle.IsCertain()
}
