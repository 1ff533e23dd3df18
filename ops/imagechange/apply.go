// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagechange

import (
	"context"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// Apply makes the clone of the incumbent's config one of the image that the successor gets.
func (c *Change) Apply(ctx context.Context, config *runtimeapi.ContainerConfig) error {
	if c.want == nil {
		return c.useSpec(ctx, config)
	}
	if err := c.use(ctx, config); err != nil {
		return err
	}
	if c.isUpgrade() { // kubelet will ask for it once the pod's spec has the new image
		hash := criclone.KubeletHash(config.GetMetadata().GetName(), c.want.GetImage())
		config.Annotations[criclone.AnnotationHash] = hash
	}
	return nil
}

// use makes the config one of the new image. Its hash stays as it is: with that of the pod's spec
// kubelet is content.
func (c *Change) use(ctx context.Context, config *runtimeapi.ContainerConfig) error {
	name, ref := c.want.GetImage(), c.want.GetImage()
	if o := c.handle.Record().Override; o != nil {
		ref = o.ImageID // what the name meant then
	}
	if err := c.loadImages(ctx, ref, config.GetImage().GetImage()); err != nil {
		return err
	}
	criclone.SetImage(config, name, c.image.GetId())
	if c.want.RunAsUser == nil { // else it is the pod's and not the image's
		criclone.AdoptImageUser(config, c.old, c.image)
	}
	return nil
}

// loadImages asks the runtime for both images, once. old is the ID of the incumbent's.
func (c *Change) loadImages(ctx context.Context, ref, old string) error {
	for ref, into := range map[string]**runtimeapi.Image{ref: &c.image, old: &c.old} {
		if *into != nil {
			continue
		}
		err := c.node.Runtime.Retry(ctx, func() error {
			st, err := c.node.Service.ImageStatus(ctx,
				&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
			*into = st.GetImage()
			return err
		})
		if err != nil {
			return operation.Failf(opsv1.ReasonCreateFailed, "reading image %s: %v", ref, err)
		}
		if *into == nil && into == &c.image {
			return operation.Failf(opsv1.ReasonCreateFailed, "image %s is not on the node any more", ref)
		}
	}
	return nil
}

// useSpec gives the successor of a plain restart what the image of the pod's spec means on this
// node now: a tag may have moved since the incumbent's start.
func (c *Change) useSpec(ctx context.Context, config *runtimeapi.ContainerConfig) error {
	name := config.GetImage().GetUserSpecifiedImage()
	if c.node.Puller == nil || name == "" || c.node.Overrides.Of(c.slot()) != nil {
		return nil
	}
	now, err := c.node.find(ctx, name)
	switch {
	case err != nil:
		return err
	case now == nil:
		return operation.Failf(opsv1.ReasonPullFailed, "image %s is not on the node any more: was it removed just now?",
			name)
	case now.GetId() == config.GetImage().GetImage():
		return nil
	}
	old, err := c.node.find(ctx, config.GetImage().GetImage())
	if err != nil {
		return err
	}
	// Who sends an environment knows the pod, and has said what that demands of the user; else only
	// the container can tell.
	env, _ := c.c.Operation.Environment(c.spec.GetName())
	if env != nil {
		err := unfit(criclone.CheckNonRoot(now, &opsv1.ContainerUpgrade{
			Name: c.spec.GetName(), Image: name, RunAsNonRoot: c.spec.GetRunAsNonRoot(), RunAsUser: c.spec.RunAsUser,
		}))
		if err != nil {
			return err
		}
	} else if criclone.NonRootByImage(config, old) && criclone.IsRoot(criclone.ImageUser(now)) {
		return operation.Failf(opsv1.ReasonImageUnfit,
			"image %s has moved to one that runs as root, and the one that runs "+
				"does not: the pod may insist on that, which this node cannot tell; delete the pod to have kubelet "+
				"decide", name)
	}
	c.c.Log.WithField("image", now.GetId()).Info("the image of the pod's spec is another one by now")
	criclone.SetImage(config, name, now.GetId())
	if env == nil || c.spec.RunAsUser == nil {
		criclone.AdoptImageUser(config, old, now)
	}
	return nil
}

// ApplyVolumes gives the mounts of volumes of type image what their references mean on this node
// now.
func (c *Change) ApplyVolumes(ctx context.Context, config *runtimeapi.ContainerConfig, env *opsv1.Environment) error {
	if c.node.Puller == nil {
		return nil
	}
	for _, v := range env.GetImageVolumes() {
		i := slices.IndexFunc(config.GetMounts(), func(m *runtimeapi.Mount) bool {
			return m.GetContainerPath() == v.GetContainerPath()
		})
		if i < 0 || config.Mounts[i].GetImage() == nil {
			continue
		}
		now, err := c.node.find(ctx, v.GetReference())
		switch {
		case err != nil:
			return err
		case now == nil:
			return operation.Failf(opsv1.ReasonPullFailed,
				"image %s of the volume at %s is not on the node any more: was it "+
					"removed just now?", v.GetReference(), v.GetContainerPath())
		}
		config.Mounts[i].Image.Image = now.GetId()
	}
	return nil
}
