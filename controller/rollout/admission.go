// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/apierror"
)

// The API server may deny a change or make another one of it: policies, quotas, webhooks that turn tags into digests. So it is asked first, with
// the very patch as a dry run, before a node has done anything, and once more before the node is told that the patch comes. What it answers is
// what pods and templates are to become.

// rewrite is an image that was asked for, and what admission has made of it. Both are empty where it has left the image alone.
type rewrite struct {
	Asked string `json:"asked,omitempty"`
	Got   string `json:"got,omitempty"`
}

// covers says that what was asked for is there.
func (r rewrite) covers(asked, have string) bool {
	return r.Got != "" && r.Asked == asked && r.Got == have
}

// rewrites are those of containers, by name.
type rewrites map[string]rewrite

// of is what an image becomes.
func (r rewrites) of(container, image string) string {
	if a := r[container]; a.Got != "" && a.Asked == image {
		return a.Got
	}
	return image
}

// all is of for several containers.
func (r rewrites) all(images map[string]string) map[string]string {
	become := make(map[string]string, len(images))
	for name, image := range images {
		become[name] = r.of(name, image)
	}
	return become
}

// rewritesOf compares what was asked for with what is there.
func rewritesOf(asked, got map[string]string) rewrites {
	r := rewrites{}
	for name, image := range asked {
		if got[name] != image {
			r[name] = rewrite{image, got[name]}
		}
	}
	return r
}

// differs names the first container for which two answers are not the same.
func (r rewrites) differs(from rewrites, asked map[string]string) (string, bool) {
	for _, name := range sortedKeys(asked) {
		if r.of(name, asked[name]) != from.of(name, asked[name]) {
			return name, true
		}
	}
	return "", false
}

// admissionError says that the API server will not have a change, or not the same one twice.
type admissionError struct {
	failure
	// err is the API server's; nil without.
	err error
}

func (e *admissionError) Error() string { return e.message }
func (e *admissionError) Unwrap() error { return e.err }

// denied makes an admissionError of what the API server says for good; other errors stay what they are.
func denied(err error, what string) error {
	words, ok := apierror.Denied(err)
	if !ok {
		return err
	}
	return &admissionError{failure{failDenied, fmt.Sprintf("the API server does not let %s be changed: %s", what, words)}, err}
}

// unsteady says that admission makes different things of the same image.
func unsteady(what, container, asked, first, then string) error {
	return &admissionError{failure: failure{failRewritten, fmt.Sprintf("admission has made %s of image %s of container %s in %s, and %s before: a change cannot be prepared if its image is not known",
		then, asked, container, what, first)}}
}

// refusal is the failure that an error stands for; nil if it is not for good.
func refusal(err error) *failure {
	var a *admissionError
	if errors.As(err, &a) {
		return &a.failure
	}
	return nil
}

// apiStatus says that an error is an answer of the API server, or that it does not answer.
func apiStatus(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status)
}

// tooLong is the failure of a pod that the API server could not let be changed in time.
func tooLong(pod string, deadline time.Duration, err error) failure {
	return failure{failDeadline, fmt.Sprintf("pod %s could not be changed for %s: %s", pod, deadline, err)}
}

// refuse keeps why the template is not changed.
func (w *work) refuse(revision string, why *failure) {
	if w.refused == nil {
		w.refused = map[string]*failure{}
	}
	w.refused[revision] = why
}

// dryRun lets the API server say what it would make of a patch of a pod, and returns the images, and those of other containers that it
// would change as well.
func (r *Reconciler) dryRun(ctx context.Context, pod *corev1.Pod, c *podChange) (answers rewrites, more map[string]string, err error) {
	patch, err := c.patch("")
	if err != nil {
		return nil, nil, err
	}
	answer := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}
	if err := r.Client.Patch(ctx, answer, client.RawPatch(types.StrategicMergePatchType, patch), client.DryRunAll); err != nil {
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

// podChange is what is written into a pod: images, the label of its revision, and the mark that says so, in one patch.
type podChange struct {
	pod         *corev1.Pod
	images      map[string]string
	label       string
	annotations map[string]any
}

// patch is the strategic merge patch. With a version it is for the pod as it was read.
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

// podImages are the images of the containers of a pod that can be changed in place.
func podImages(pod *corev1.Pod) map[string]string {
	return templateImages(&corev1.PodTemplateSpec{Spec: pod.Spec})
}

// troublePauseMax bounds the pauses between two tries.
const troublePauseMax = 30 * time.Second

// apiTrouble is what goes wrong with the API server and may pass: a webhook that is away, a time-out.
type apiTrouble struct {
	count int
	text  string
	// since is when it began, until when nothing is tried again.
	since, until time.Time
}

// note counts an error.
func (t *apiTrouble) note(err error, now time.Time) {
	if t.count++; t.count == 1 {
		t.since = now
	}
	t.text, t.until = err.Error(), now.Add(min(time.Second<<min(t.count-1, 5), troublePauseMax))
}

// waits says that the API server is not to be asked yet, and has that looked at again when it may be.
func (p *pass) waits(t *apiTrouble) bool {
	left := t.until.Sub(p.now)
	if left > 0 {
		p.wait = sooner(p.wait, left)
	}
	return left > 0
}

// apiTrouble says what the API server has failed with again and again; empty when it has not.
func (p *pass) apiTrouble() string {
	p.work.mu.Lock()
	defer p.work.mu.Unlock()
	for _, i := range p.items {
		all := []apiTrouble{i.m.api}
		if t := i.m.visit; t != nil && !t.over && t.failed == nil {
			all = append(all, t.api)
		}
		for _, t := range all {
			if t.count >= apierror.Tries {
				return fmt.Sprintf("pod %s cannot be changed, %d tries have failed since %s: %s", i.pod.Name, t.count, t.since.UTC().Format(time.RFC3339), t.text)
			}
		}
	}
	return ""
}
