// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
)

// Tag is what a container's tag names, as the node has found out.
type Tag int

// Nobody knows yet, or the tag names an image.
const (
	TagUnknown Tag = iota
	TagSame        // the image that runs
	TagMoved       // another one
)

// mayMove returns true if the image reference of a running container may name another image by now.
// Kubelet, too, would resolve it again.
func mayMove(pod *corev1.Pod, c *corev1.Container) bool {
	if c.ImagePullPolicy != corev1.PullAlways {
		return false
	}
	if ref, err := reference.ParseDockerRef(c.Image); err == nil {
		if _, fixed := ref.(reference.Digested); fixed {
			return false
		}
	}
	_, running := RunningIDs(pod, []string{c.Name})
	return running // else kubelet pulls before it starts it
}

// Lacks says in words that something has no such container, and which containers it has.
func Lacks(what, name, change string, has []string) string {
	return fmt.Sprintf("%s has no container %s that can be %s in place; it has %s", what, name, change,
		strings.Join(has, ", "))
}

// What can be done to a container, in words.
const (
	ToChange  = "changed"
	ToRestart = "restarted"
)
