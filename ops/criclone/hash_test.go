// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone_test

import (
	"testing"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// The first is a golden value of kubelet's own test (container_hash_test.go). The others were
// computed with the libraries that kubelet 1.37.2 uses.
func TestKubeletHash(t *testing.T) {
	for _, tt := range []struct{ name, image, want string }{
		{"test_container", "foo/image:v1", "8e45cbd0"},
		{
			"app", "registry.example:5000/a/b@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
			"a13dd9ce",
		},
		{"x3", "busybox:1.36", "33866410"},
		{"app", "app:v103", "33502"}, // leading zeros are left out
		{"app", "a<b>&c", "89bb441"}, // as HTML in JSON
		{"app", "", "613cf98"},
	} {
		t.Run(tt.image, func(t *testing.T) {
			if got := criclone.KubeletHash(tt.name, tt.image); got != tt.want {
				t.Errorf("KubeletHash(%q, %q) = %s, want %s", tt.name, tt.image, got, tt.want)
			}
		})
	}
}
