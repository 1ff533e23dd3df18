// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"math"
	"runtime"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/imageinfo"
)

// ReasonImageUnfit is for an image that cannot run as that container.
const ReasonImageUnfit = "ImageUnfit"

// imageFits returns an *outcome that tells why the image cannot take the place of the one in req, or nil. st is its verbose status, req the
// request that the new container will be created with, and want what has been asked for. What only containerd tells is not looked at
// with other runtimes.
func imageFits(st *runtimeapi.ImageStatusResponse, req *runtimeapi.CreateContainerRequest, want *opsv1.ContainerUpgrade) error {
	if st.GetImage() == nil {
		return failf(ReasonImageUnfit, "image %s is not on the node", want.GetImage())
	}
	if config := imageinfo.Config(st); config != nil {
		if err := imageinfo.CheckPlatform(config, want.GetImage(), runtime.GOOS, runtime.GOARCH); err != nil {
			return failf(ReasonImageUnfit, "%v", err)
		}
		c := req.GetConfig()
		if len(c.GetCommand())+len(c.GetArgs())+len(config.Config.Entrypoint)+len(config.Config.Cmd) == 0 {
			return failf(ReasonImageUnfit, "image %s has neither an entrypoint nor a command, and the container has no command either: there is nothing to run", want.GetImage())
		}
	}
	return nonRootFits(st.GetImage(), want)
}

// nonRootFits decides and says what kubelet does (security_context_others.go verifyRunAsNonRoot).
func nonRootFits(image *runtimeapi.Image, want *opsv1.ContainerUpgrade) error {
	if !want.GetRunAsNonRoot() {
		return nil
	}
	if want.RunAsUser != nil {
		if want.GetRunAsUser() == 0 {
			return failf(ReasonImageUnfit, "container's runAsUser breaks non-root policy (container: %s)", want.GetName())
		}
		return nil
	}
	uid, username := imageUser(image)
	switch {
	case uid == nil:
		return failf(ReasonImageUnfit, "container has runAsNonRoot and image %s has non-numeric user (%s), cannot verify user is non-root (container: %s)", want.GetImage(), username, want.GetName())
	case uid.GetValue() == 0:
		return failf(ReasonImageUnfit, "container has runAsNonRoot and image %s will run as root (container: %s)", want.GetImage(), want.GetName())
	case uid.GetValue() < 0 || uid.GetValue() > math.MaxInt32:
		return failf(ReasonImageUnfit, "container has runAsNonRoot and image %s has an invalid user id (%d). (Must be 1-(%d)) (container: %s)", want.GetImage(), uid.GetValue(), math.MaxInt32, want.GetName())
	}
	return nil
}

// isRoot reports whether a container with that user runs as root, as far as its name tells.
func isRoot(uid *runtimeapi.Int64Value, username string) bool {
	return uid != nil && uid.GetValue() == 0 || username == "root"
}

// nonRootByImage reports whether the container does not run as root and has that from its image, which is the one given. The pod may
// insist on it (runAsNonRoot), and the runtime is not told.
func nonRootByImage(c *runtimeapi.ContainerConfig, image *runtimeapi.Image) bool {
	sc := c.GetLinux().GetSecurityContext()
	uid, username := imageUser(image)
	return image != nil && proto.Equal(sc.GetRunAsUser(), uid) && sc.GetRunAsUsername() == username && !isRoot(uid, username)
}

// imageUser is kubelet's getImageUser (kuberuntime/helpers.go): an image without a user runs as root.
func imageUser(image *runtimeapi.Image) (*runtimeapi.Int64Value, string) {
	switch {
	case image.GetUid() != nil:
		return &runtimeapi.Int64Value{Value: image.GetUid().GetValue()}, ""
	case image.GetUsername() != "":
		return nil, image.GetUsername()
	}
	return &runtimeapi.Int64Value{}, ""
}

// adoptImageUser sets in next the user that kubelet would take from the new image, if the one there comes from the old
// image, whose user it is then. kubelet does that only if the pod names none (security_context.go
// determineEffectiveSecurityContext): do not call this for a pod that is known to name one, which may be that of the old image by
// chance. Without the old image next stays as it is.
func adoptImageUser(next *runtimeapi.ContainerConfig, old, new *runtimeapi.Image) {
	sc := next.GetLinux().GetSecurityContext()
	if sc == nil || old == nil || new == nil {
		return
	}
	uid, username := imageUser(old)
	if !proto.Equal(sc.GetRunAsUser(), uid) || sc.GetRunAsUsername() != username {
		return
	}
	sc.RunAsUser, sc.RunAsUsername = imageUser(new)
}
