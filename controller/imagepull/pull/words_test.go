// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pull_test

import (
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
)

// Nodes of the version before say why an attempt failed in their message.
func TestFailureOf(t *testing.T) {
	for message, want := range map[string][2]string{
		"attempt 2 of 4 in 1s: NotFound: registry r.io has no such image: check": {
			"NotFound", "registry r.io has no such image: check",
		},
		// a still older node
		"attempt 2 of 4 in 1s: registry r.io cannot be used now (x: y)": {"",
			"registry r.io cannot be used now (x: y)"},
		"another pull of the image has just failed": {"",
			"another pull of the image has just failed"},
		"": {},
	} {
		if reason, text := pull.FailureOf(&opsv1.PullOperation{Message: message}); reason != want[0] ||
			text != want[1] {
			t.Errorf("%q: %q, %q", message, reason, text)
		}
	}
}
