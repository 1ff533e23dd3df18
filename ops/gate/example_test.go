// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gate_test

import (
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/gate"
)

// A container that mounts something over /dev cannot have a gate.
func ExampleFits() {
	for _, path := range []string{"/data", "/dev"} {
		fits := gate.Fits(&runtimeapi.ContainerConfig{
			Mounts: []*runtimeapi.Mount{{HostPath: "/srv", ContainerPath: path}},
		})
		fmt.Println(path, fits)
	}
	// Output:
	// /data <nil>
	// /dev it has a mount at /dev
}
