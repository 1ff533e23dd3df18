// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"fmt"

	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

func ExampleNormalize() {
	for _, image := range []string{"nginx", "registry.example:5000/team/app:v2"} {
		named, err := registry.Normalize(image)
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		host, path := registry.HostOf(named)
		fmt.Println(named, host, path)
	}
	// Output:
	// docker.io/library/nginx:latest docker.io library/nginx
	// registry.example:5000/team/app:v2 registry.example:5000 team/app
}
