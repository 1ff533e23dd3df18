// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

func TestAuthConfig(t *testing.T) {
	if registry.AuthConfig(nil) != nil {
		t.Error("no credential is one")
	}
	basic := registry.AuthConfig(&opsv1.RegistryCredential{Username: "u", Password: "p"})
	if basic.GetUsername() != "u" || basic.GetPassword() != "p" {
		t.Errorf("%v", basic)
	}
	// containerd would take the name, and leave the token.
	const noName = "00000000-0000-0000-0000-000000000000"
	token := registry.AuthConfig(&opsv1.RegistryCredential{Username: noName, IdentityToken: "t"})
	if token.GetUsername() != "" || token.GetIdentityToken() != "t" {
		t.Errorf("%v", token)
	}
}

func TestNormalize(t *testing.T) {
	const sum = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	for image, want := range map[string]string{
		"nginx":                     "docker.io/library/nginx:latest",
		"nginx:1":                   "docker.io/library/nginx:1",
		"team/app":                  "docker.io/team/app:latest",
		"localhost/app":             "localhost/app:latest",
		"registry:5000/app":         "registry:5000/app:latest",
		"registry:5000/app:1":       "registry:5000/app:1",
		"registry.io/app@" + sum:    "registry.io/app@" + sum,
		"registry.io/app:1@" + sum:  "registry.io/app@" + sum,
		"index.docker.io/nginx":     "docker.io/library/nginx:latest",
		"[::1]:5000/app":            "[::1]:5000/app:latest",
		"registry.io/a/b/c/d/e/f:1": "registry.io/a/b/c/d/e/f:1",
	} {
		named, err := registry.Normalize(image)
		if err != nil || named.String() != want {
			t.Errorf("%s: %v, %v", image, named, err)
		}
	}
}
