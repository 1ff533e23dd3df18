// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package keyring_test

import (
	"fmt"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// The credential whose entry is the closest to the image comes first.
func ExampleForImage() {
	all := []*opsv1.RegistryCredential{
		{Match: "*.registry.example", Username: "everybody"},
		{Match: "eu.registry.example/team", Username: "team"},
		{Match: "docker.io", Username: "somebody"},
	}
	for _, c := range keyring.ForImage(all, "eu.registry.example/team/app:v2") {
		fmt.Println(c.GetUsername())
	}
	// Output:
	// team
	// everybody
}
