// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// Rewrite is an image that a rollout asked for, and the image that admission has made of it. Both
// are empty if admission has left the image alone.
type Rewrite struct {
	Asked string `json:"asked,omitempty"`
	Got   string `json:"got,omitempty"`
}

// covers returns true if have is what admission makes of asked.
func (r Rewrite) covers(asked, have string) bool {
	return r.Got != "" && r.Asked == asked && r.Got == have
}

// Rewrites are rewrites by container.
type Rewrites map[string]Rewrite

// Of returns what an image becomes.
func (r Rewrites) Of(container, image string) string {
	if a := r[container]; a.Got != "" && a.Asked == image {
		return a.Got
	}
	return image
}

// All returns what the images of several containers become.
func (r Rewrites) All(images map[string]string) map[string]string {
	become := make(map[string]string, len(images))
	for name, image := range images {
		become[name] = r.Of(name, image)
	}
	return become
}

// RewritesOf compares the images that were asked for with those that are there.
func RewritesOf(asked, got map[string]string) Rewrites {
	r := Rewrites{}
	for name, image := range asked {
		if got[name] != image {
			r[name] = Rewrite{image, got[name]}
		}
	}
	return r
}

// Differs names the first container for which two answers differ.
func (r Rewrites) Differs(from Rewrites, asked map[string]string) (string, bool) {
	for _, name := range objects.SortedKeys(asked) {
		if r.Of(name, asked[name]) != from.Of(name, asked[name]) {
			return name, true
		}
	}
	return "", false
}
