// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageinfo

import (
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestCheckPlatform(t *testing.T) {
	for _, tt := range []struct {
		image, node string // architectures
		fits        bool
	}{
		{"amd64", "amd64", true}, {"x86_64", "amd64", true}, {"386", "amd64", true}, {"arm64", "amd64", false}, {"amd64", "386", false},
		{"arm64", "arm64", true}, {"aarch64", "arm64", true}, {"amd64", "arm64", false}, {"arm", "arm", true}, {"s390x", "s390x", true},
	} {
		t.Run(tt.image+" on "+tt.node, func(t *testing.T) {
			image := &imagespec.Image{Platform: imagespec.Platform{OS: "linux", Architecture: tt.image, Variant: "v7"}}
			if err := CheckPlatform(image, "app:v2", "linux", tt.node); (err == nil) != tt.fits {
				t.Errorf("CheckPlatform: %v", err)
			}
		})
	}
}
