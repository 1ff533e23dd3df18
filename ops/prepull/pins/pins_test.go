// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pins_test

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
)

func TestNameOf(t *testing.T) {
	image := &runtimeapi.Image{
		Id: "sha256:0123456789abcdef", RepoTags: []string{"docker.io/library/nginx:1"},
		RepoDigests: []string{"docker.io/library/nginx@sha256:00"},
	}
	untagged := &runtimeapi.Image{Id: image.GetId(), RepoDigests: image.GetRepoDigests()}
	for _, tt := range []struct {
		asked string
		image *runtimeapi.Image
		want  string
	}{
		{"nginx:1", image, "docker.io/library/nginx:1"},
		{"nginx", image, "docker.io/library/nginx:latest"},
		{image.GetId(), image, "docker.io/library/nginx:1"},
		{"0123456789ab", image, "docker.io/library/nginx:1"},
		{image.GetId(), untagged, "docker.io/library/nginx@sha256:00"},
		{image.GetId(), &runtimeapi.Image{Id: image.GetId()}, image.GetId()},
	} {
		t.Run(tt.asked, func(t *testing.T) {
			if got := pins.NameOf(tt.image, tt.asked); got != tt.want {
				t.Errorf("NameOf(%q): %s, want %s", tt.asked, got, tt.want)
			}
		})
	}
}
