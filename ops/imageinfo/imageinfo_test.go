// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageinfo

import (
	"runtime"
	"strings"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestConfigTakesLittleMemory has an image whose maker wants it to take much.
func TestConfigTakesLittleMemory(t *testing.T) {
	st := &runtimeapi.ImageStatusResponse{
		Info: map[string]string{
			"info": `{"imageSpec":{"os":"linux","architecture":"arm64","config":{"Entrypoint":["/app"],"Cmd":["-v"]},` +
				`"history":[` + strings.Repeat("{},", 8<<20/3) + `{}]}}`}}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	c := Config(st)
	runtime.ReadMemStats(&after)
	if c == nil || c.OS != "linux" || c.Architecture != "arm64" || len(c.Config.Entrypoint) != 1 ||
		len(c.Config.Cmd) != 1 {
		t.Errorf("%v", c)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 32<<20 {
		t.Errorf("%d MiB of memory", got>>20)
	}
	if Config(&runtimeapi.ImageStatusResponse{}) != nil {
		t.Error("a config of nothing")
	}
}

func TestCheckPlatform(t *testing.T) {
	for _, tt := range []struct {
		image, node string // architectures
		fits        bool
	}{
		{"amd64", "amd64", true}, {"x86_64", "amd64", true}, {"386", "amd64", true}, {"arm64", "amd64", false},
		{"amd64", "386", false},
		{"arm64", "arm64", true}, {"aarch64", "arm64", true}, {"amd64", "arm64", false}, {"arm", "arm", true},
		{"s390x", "s390x", true},
	} {
		t.Run(tt.image+" on "+tt.node, func(t *testing.T) {
			image := &imagespec.Image{Platform: imagespec.Platform{OS: "linux", Architecture: tt.image, Variant: "v7"}}
			if err := CheckPlatform(image, "app:v2", "linux", tt.node); (err == nil) != tt.fits {
				t.Errorf("CheckPlatform: %v", err)
			}
		})
	}
}
