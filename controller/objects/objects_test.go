// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package objects_test

import (
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// The hashes of other versions are in objects and on nodes.
func TestHash(t *testing.T) {
	for _, tt := range []struct {
		parts []any
		want  string
	}{
		{nil, "74234e98af"},
		{[]any{"a", 1, map[string]string{"b": "c"}}, "6d3b1be0d0"},
	} {
		if got := objects.Hash(tt.parts...); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.parts, got, tt.want)
		}
	}
}

func TestClip(t *testing.T) {
	for text, want := range map[string]string{
		"short": "short", strings.Repeat("x", 10): strings.Repeat("x", 10),
		strings.Repeat("x", 11): strings.Repeat("x", 10) +
			"…",
		strings.Repeat("x", 9) + "ä": strings.Repeat("x", 9) + "…",
	} {
		if got := objects.Clip(text, 10); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
