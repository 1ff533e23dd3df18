// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// InPlaceState is the value of PodStateAnnotation. It says what a rollout has changed in a pod, and
// is written together with the change. Names and order of the JSON fields must stay: other versions
// of the controller read them.
type InPlaceState struct {
	Rollout  types.UID `json:"rollout"`
	Revision string    `json:"revision"`
	// Operation is the UID of the node's operation; empty if kubelet makes the container without
	// the node's help.
	Operation string           `json:"operation,omitempty"`
	Time      metav1.MicroTime `json:"time"`
	// Containers are the containers that were changed or restarted, as they were before.
	Containers map[string]Previous `json:"containers"`
	// There are images that admission makes of the goal's, for containers that had them already.
	There Rewrites `json:"there,omitempty"`
}

// Previous is a container before it was changed.
type Previous struct {
	// Image is the image of the spec. Base is the image that a rollback puts back: the one before
	// all unfinished changes.
	Image string `json:"image,omitempty"`
	Base  string `json:"base,omitempty"`
	// ID and ImageID are from the status.
	ID      string `json:"id,omitempty"`
	ImageID string `json:"imageID,omitempty"`
	Rewrite
}

// StateOf reads the annotation; nil if there is none, or if it cannot be read.
func StateOf(pod *corev1.Pod) *InPlaceState {
	text := pod.Annotations[inplace.PodStateAnnotation]
	if text == "" {
		return nil
	}
	var m InPlaceState
	if json.Unmarshal([]byte(text), &m) != nil {
		return nil
	}
	return &m
}

// IsOf returns true if the state was written for the goal.
func (m *InPlaceState) IsOf(g Goal) bool {
	return m != nil && m.Rollout == g.Rollout && m.Revision == g.Revision
}

// RestartUID is the UID of the node's operation that restarts the containers which keep their
// images.
func (m *InPlaceState) RestartUID(pod *corev1.Pod) string {
	ids := map[string]string{}
	for name, old := range m.Containers {
		if c := pods.Changeable(pod, name); c != nil && c.Image == old.Image && old.ID != "" {
			ids[name] = old.ID
		}
	}
	return OperationUID("r", Goal{Rollout: m.Rollout, Revision: m.Revision}, pod, ids, 0)
}
