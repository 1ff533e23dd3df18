// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// FindPrevious adds to previous the images that these images replace, as far as they are known. It
// returns true if it has added some.
func (t *Target) FindPrevious(images, previous map[string]string) bool {
	more := false
	for name, image := range images {
		if previous[name] != "" {
			continue
		}
		was := ""
		if w := t.Workload; w != nil && w.image(name) != image {
			was = w.image(name)
		}
		if was == "" {
			was = Usual(t.Pods, name, image)
		}
		if was != "" {
			previous[name], more = was, true
		}
	}
	return more
}

// Usual returns the image that most pods have in a container, other than besides.
func Usual(list []*corev1.Pod, name, besides string) string {
	counts := map[string]int{}
	for _, pod := range list {
		if c := pods.Changeable(pod, name); c != nil && pods.Active(pod) && c.Image != besides {
			counts[c.Image]++
		}
	}
	best := ""
	for _, image := range objects.SortedKeys(counts) {
		if best == "" || counts[image] > counts[best] {
			best = image
		}
	}
	return best
}
