// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"path/filepath"
)

// PushCRITestImages pushes the images that critest (the CRI conformance tests of cri-tools, in
// [Bed.Bin]) pulls by their public names (pkg/validate/consts.go there), made from busybox and app,
// and returns critest's arguments for them. The one image that it names by digest cannot be made:
// skip "image digest".
func (b *Bed) PushCRITestImages(ctx context.Context) ([]string, error) {
	const (
		staging = "k8s-staging-cri-tools/test-image-"
		e2e     = "e2e-test-images/"
	)
	copies := map[string]string{"pause:3.9": pauseImage, staging + "tag:test": "busybox:1.0",
		staging + "tag:all": "busybox:1.0", staging + "latest:latest": "busybox:1.0"}
	for i, v := range busyboxVersions {
		copies[fmt.Sprintf("%s%d:latest", staging, i+1)] = "busybox:" + v
		copies[fmt.Sprintf("%stags:%d", staging, i+1)] = "busybox:1.0"
	}
	for dst, src := range copies {
		if err := crane(ctx, b.Bin, "copy", "--insecure", b.Image(src), b.Image(dst)); err != nil {
			return nil, err
		}
	}
	for name, user := range map[string]string{
		staging + "user-uid:latest":            "1002",
		staging + "user-username:latest":       "www-data",
		staging + "user-uid-group:latest":      "1003:1004",
		staging + "user-username-group:latest": "www-data:1004",
		staging + "predefined-group:latest":    "1000",
	} {
		if err := crane(ctx, b.Bin, "mutate", "--insecure", "-t", b.Image(name), "--user", user,
			b.Image("busybox:1.0")); err != nil {
			return nil, err
		}
	}
	for name, port := range map[string]string{e2e + "nginx:1": "80",
		"k8s-staging-cri-tools/hostnet-nginx-amd64:latest": "12003"} {
		if err := crane(ctx, b.Bin, "mutate", "--insecure", "-t", b.Image(name), "--env", "PORT="+port,
			b.Image("app:1")); err != nil {
			return nil, err
		}
	}
	images := filepath.Join(b.Dir, "etc", "critest-images.yaml")
	err := writeYAML(images, map[string]string{"defaultTestContainerImage": b.Image("busybox:1.0"),
		"webServerTestImage": b.Image(e2e + "nginx:1")})
	return []string{"-runtime-endpoint", "unix://" + b.CRISocket, "-test-images-file", images}, err
}
