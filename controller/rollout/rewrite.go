// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"maps"
	"slices"
)

// rewrite is an image that a rollout asked for, and the image that admission has made of it. Both are empty if admission has left the
// image alone.
type rewrite struct {
	Asked string `json:"asked,omitempty"`
	Got   string `json:"got,omitempty"`
}

// covers returns true if have is what admission makes of asked.
func (r rewrite) covers(asked, have string) bool {
	return r.Got != "" && r.Asked == asked && r.Got == have
}

// rewrites are rewrites by container.
type rewrites map[string]rewrite

// of returns what an image becomes.
func (r rewrites) of(container, image string) string {
	if a := r[container]; a.Got != "" && a.Asked == image {
		return a.Got
	}
	return image
}

// all returns what the images of several containers become.
func (r rewrites) all(images map[string]string) map[string]string {
	become := make(map[string]string, len(images))
	for name, image := range images {
		become[name] = r.of(name, image)
	}
	return become
}

// rewritesOf compares the images that were asked for with those that are there.
func rewritesOf(asked, got map[string]string) rewrites {
	r := rewrites{}
	for name, image := range asked {
		if got[name] != image {
			r[name] = rewrite{image, got[name]}
		}
	}
	return r
}

// differs names the first container for which two answers differ.
func (r rewrites) differs(from rewrites, asked map[string]string) (string, bool) {
	for _, name := range slices.Sorted(maps.Keys(asked)) {
		if r.of(name, asked[name]) != from.of(name, asked[name]) {
			return name, true
		}
	}
	return "", false
}
