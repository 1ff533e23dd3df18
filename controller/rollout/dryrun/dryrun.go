// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package dryrun asks the API server what it would make of a change: admission policies, quotas and
// webhooks may refuse it, or make another one of it, for example a digest instead of a tag. It
// sends the very patch as a dry run, before a node does anything, and once more before the node is
// told that the patch comes. Pods and templates then become what admission has answered.
package dryrun

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// Error says that the API server refuses a change for good, or makes another change of it each
// time.
type Error struct {
	evaluate.Failure
	// err is the API server's error; nil if there is none.
	err error
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.err }

// Denied returns an *Error if the API server refuses a change for good, else err itself.
func Denied(err error, what string) error {
	words, ok := apierror.Denied(err)
	if !ok {
		return err
	}
	return &Error{evaluate.Failure{Reason: evaluate.FailDenied,
		Message: fmt.Sprintf("the API server does not let %s be changed: %s", what, words)}, err}
}

// Unsteady returns an *Error: admission makes different images of the same one.
func Unsteady(what, container, asked, first, then string) error {
	return &Error{Failure: evaluate.Failure{Reason: evaluate.FailRewritten,
		Message: fmt.Sprintf("admission has made %s of image %s of container %s in %s, and %s before: a change "+
			"cannot be prepared if its image is not known",
			then, asked, container, what, first)}}
}

// Refusal returns the failure of an *Error; nil for all other errors.
func Refusal(err error) *evaluate.Failure {
	var a *Error
	if errors.As(err, &a) {
		return &a.Failure
	}
	return nil
}

// Pod asks the API server what it would make of the change of a pod. It returns the images that
// admission makes of those of the change, and in more the images of other containers that admission
// would change as well.
func Pod(
	ctx context.Context, api client.Client, pod *corev1.Pod, c *PodChange,
) (answers evaluate.Rewrites, more map[string]string, err error) {
	patch, err := c.Patch("")
	if err != nil {
		return nil, nil, err
	}
	answer := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	if err := api.Patch(ctx, answer, client.RawPatch(types.StrategicMergePatchType, patch),
		client.DryRunAll); err != nil {
		return nil, nil, Denied(err, "pod "+pod.Name)
	}
	got, have := podtemplate.PodImages(answer), podtemplate.PodImages(pod)
	for name, image := range got {
		if c.Images[name] == "" && image != have[name] {
			if more == nil {
				more = map[string]string{}
			}
			more[name] = image
		}
	}
	return evaluate.RewritesOf(c.Images, got), more, nil
}

// PodChange is the change of a pod: images, the label of its revision, and the annotation with the
// state, in one patch.
type PodChange struct {
	Pod    *corev1.Pod
	Images map[string]string
	Label  string
	State  *evaluate.InPlaceState
}

// Patch returns the strategic merge patch. If version is set, the patch fails when the pod has
// changed since that version.
func (c *PodChange) Patch(version string) ([]byte, error) {
	state, err := json.Marshal(c.State)
	if err != nil {
		return nil, err
	}
	meta := map[string]any{"uid": c.Pod.UID, "annotations": map[string]any{
		inplace.PodStateAnnotation: string(state),
	}}
	if version != "" {
		meta["resourceVersion"] = version
	}
	if c.Label != "" {
		meta["labels"] = map[string]any{podtemplate.RevisionLabel: c.Label}
	}
	body := map[string]any{"metadata": meta}
	if lists := podtemplate.ImageLists(&c.Pod.Spec, c.Images); len(lists) > 0 {
		body["spec"] = lists
	}
	return json.Marshal(body)
}
