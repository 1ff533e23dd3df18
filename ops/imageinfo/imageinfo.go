// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imageinfo reads what only containerd tells of an image, in its verbose status.
package imageinfo

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config is the config of the image (internal/cri/server/images/image_status.go verboseImageInfo),
// or nil with a runtime that does not tell it. Only platform, entrypoint and command are in it: who
// makes an image chooses how long its history and its lists are, and three bytes of them become
// eighty.
func Config(st *runtimeapi.ImageStatusResponse) *imagespec.Image {
	var info struct {
		Spec *struct {
			OS           string `json:"os"`
			Architecture string `json:"architecture"`
			Config       struct{ Entrypoint, Cmd []string }
		} `json:"imageSpec"`
	}
	if json.Unmarshal([]byte(st.GetInfo()["info"]), &info) != nil || info.Spec == nil {
		return nil
	}
	return &imagespec.Image{
		Platform: imagespec.Platform{OS: info.Spec.OS, Architecture: info.Spec.Architecture},
		Config:   imagespec.ImageConfig{Entrypoint: info.Spec.Config.Entrypoint, Cmd: info.Spec.Config.Cmd},
	}
}

// CheckPlatform returns an error if the image called name cannot run on a node of that system and
// architecture: containerd pulls such an image when there is no other to choose from. It is as
// lenient as containerd's choice: an amd64 node runs 386 too. Variants are ignored.
func CheckPlatform(image *imagespec.Image, name, os, arch string) error {
	if image.OS == "" || image.Architecture == "" {
		return nil // containerd takes it for its own
	}
	node := imagespec.Platform{OS: os, Architecture: arch}
	if !platforms.Only(node).Match(imagespec.Platform{OS: image.OS, Architecture: image.Architecture}) {
		return fmt.Errorf("image %s is for %s/%s, this node is %s/%s", name, image.OS, image.Architecture, os, arch)
	}
	return nil
}
