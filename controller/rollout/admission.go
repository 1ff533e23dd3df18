// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller"
)

// Error says that the API server refuses a change for good, or makes another change of it each time.
type admissionError struct {
	failure
	// err is the API server's error; nil if there is none.
	err error
}

func (e *admissionError) Error() string { return e.message }
func (e *admissionError) Unwrap() error { return e.err }

// denied returns an *Error if the API server refuses a change for good, else err itself.
func denied(err error, what string) error {
	words, ok := controller.Denied(err)
	if !ok {
		return err
	}
	return &admissionError{failure{failDenied, fmt.Sprintf("the API server does not let %s be changed: %s", what, words)}, err}
}

// unsteady returns an *Error: admission makes different images of the same one.
func unsteady(what, container, asked, first, then string) error {
	return &admissionError{failure: failure{failRewritten, fmt.Sprintf("admission has made %s of image %s of container %s in %s, and %s before: a change cannot be prepared if its image is not known",
		then, asked, container, what, first)}}
}

// refusal returns the failure of an *Error; nil for all other errors.
func refusal(err error) *failure {
	var a *admissionError
	if errors.As(err, &a) {
		return &a.failure
	}
	return nil
}

// Pod asks the API server what it would make of the change of a pod. It returns the images that admission makes of those of the
// change, and in more the images of other containers that admission would change as well.
func dryRun(ctx context.Context, api client.Client, pod *corev1.Pod, c *podChange) (answers rewrites, more map[string]string, err error) {
	patch, err := c.patch("")
	if err != nil {
		return nil, nil, err
	}
	answer := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	if err := api.Patch(ctx, answer, client.RawPatch(types.StrategicMergePatchType, patch), client.DryRunAll); err != nil {
		return nil, nil, denied(err, "pod "+pod.Name)
	}
	got, have := podImages(answer), podImages(pod)
	for name, image := range got {
		if c.images[name] == "" && image != have[name] {
			if more == nil {
				more = map[string]string{}
			}
			more[name] = image
		}
	}
	return rewritesOf(c.images, got), more, nil
}

// podChange is the change of a pod: images, the label of its revision, and the annotation with the state, in one patch.
type podChange struct {
	pod         *corev1.Pod
	images      map[string]string
	label       string
	annotations map[string]any
}

// patch returns the strategic merge patch. If version is set, the patch fails when the pod has changed since that version.
func (c *podChange) patch(version string) ([]byte, error) {
	meta := map[string]any{"uid": c.pod.UID, "annotations": c.annotations}
	if version != "" {
		meta["resourceVersion"] = version
	}
	if c.label != "" {
		meta["labels"] = map[string]any{revisionLabel: c.label}
	}
	body := map[string]any{"metadata": meta}
	if lists := imageLists(&c.pod.Spec, c.images); len(lists) > 0 {
		body["spec"] = lists
	}
	return json.Marshal(body)
}
