// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"fmt"
	"math"
	"runtime"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/imageinfo"
)

// CheckImage returns an error, made for the user, if the image cannot run as the container. st is
// the image's verbose status, req creates the container, and want is what the user asked for.
// Some checks need what only containerd reports; with other runtimes they are left out.
func CheckImage(
	st *runtimeapi.ImageStatusResponse, req *runtimeapi.CreateContainerRequest, want *opsv1.ContainerUpgrade,
) error {
	if st.GetImage() == nil {
		return fmt.Errorf("image %s is not on the node", want.GetImage())
	}
	if config := imageinfo.Config(st); config != nil {
		if err := imageinfo.CheckPlatform(config, want.GetImage(), runtime.GOOS, runtime.GOARCH); err != nil {
			return err
		}
		c := req.GetConfig()
		if len(c.GetCommand())+len(c.GetArgs())+len(config.Config.Entrypoint)+len(config.Config.Cmd) == 0 {
			return fmt.Errorf("image %s has neither an entrypoint nor a command, and the container has no command "+
				"either: "+
				"there is nothing to run", want.GetImage())
		}
	}
	return CheckNonRoot(st.GetImage(), want)
}

// CheckNonRoot applies runAsNonRoot as kubelet does, with kubelet's messages
// (security_context_others.go verifyRunAsNonRoot).
func CheckNonRoot(image *runtimeapi.Image, want *opsv1.ContainerUpgrade) error {
	if !want.GetRunAsNonRoot() {
		return nil
	}
	if want.RunAsUser != nil {
		if want.GetRunAsUser() == 0 {
			return fmt.Errorf("container's runAsUser breaks non-root policy (container: %s)", want.GetName())
		}
		return nil
	}
	uid, username := ImageUser(image)
	switch {
	case uid == nil:
		return fmt.Errorf("container has runAsNonRoot and image %s has non-numeric user (%s), "+
			"cannot verify user is non-root (container: %s)", want.GetImage(), username, want.GetName())
	case uid.GetValue() == 0:
		return fmt.Errorf("container has runAsNonRoot and image %s will run as root (container: %s)",
			want.GetImage(), want.GetName())
	case uid.GetValue() < 0 || uid.GetValue() > math.MaxInt32:
		return fmt.Errorf("container has runAsNonRoot and image %s has an invalid user id (%d). "+
			"(Must be 1-(%d)) (container: %s)", want.GetImage(), uid.GetValue(), math.MaxInt32, want.GetName())
	}
	return nil
}

// IsRoot reports whether a container with that user runs as root, as far as the name tells.
func IsRoot(uid *runtimeapi.Int64Value, username string) bool {
	return uid != nil && uid.GetValue() == 0 || username == "root"
}

// NonRootByImage reports whether the container has a user other than root and got it from image.
// The pod may insist on such a user (runAsNonRoot), which kubelet does not tell the runtime.
func NonRootByImage(c *runtimeapi.ContainerConfig, image *runtimeapi.Image) bool {
	sc := c.GetLinux().GetSecurityContext()
	uid, username := ImageUser(image)
	return image != nil && proto.Equal(sc.GetRunAsUser(), uid) && sc.GetRunAsUsername() == username &&
		!IsRoot(uid, username)
}

// ImageUser is kubelet's getImageUser (kuberuntime/helpers.go): an image without a user runs as
// root.
func ImageUser(image *runtimeapi.Image) (*runtimeapi.Int64Value, string) {
	switch {
	case image.GetUid() != nil:
		return &runtimeapi.Int64Value{Value: image.GetUid().GetValue()}, ""
	case image.GetUsername() != "":
		return nil, image.GetUsername()
	}
	return &runtimeapi.Int64Value{}, ""
}

// AdoptImageUser gives c the user of the new image if the user in c is that of the old image.
// Without the old image it changes nothing.
//
// Kubelet takes the image's user only if the pod names none (security_context.go
// determineEffectiveSecurityContext). Do not call it for a pod that is known to name a user, which
// may equal the old image's by chance.
func AdoptImageUser(c *runtimeapi.ContainerConfig, before, after *runtimeapi.Image) {
	sc := c.GetLinux().GetSecurityContext()
	if sc == nil || before == nil || after == nil {
		return
	}
	uid, username := ImageUser(before)
	if !proto.Equal(sc.GetRunAsUser(), uid) || sc.GetRunAsUsername() != username {
		return
	}
	sc.RunAsUser, sc.RunAsUsername = ImageUser(after)
}

// SetImage makes c run the image: id is what the runtime gets, name what the pod's spec would say.
func SetImage(c *runtimeapi.ContainerConfig, name, id string) {
	if c.Image == nil {
		c.Image = &runtimeapi.ImageSpec{}
	}
	c.Image.Image, c.Image.UserSpecifiedImage = id, name
}
