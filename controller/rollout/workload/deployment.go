// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"fmt"
	"maps"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// deploymentRevision is the annotation by which the Deployment's controller numbers ReplicaSets.
const deploymentRevision = "deployment.kubernetes.io/revision"

// deployment is a Deployment. Its controller creates a new ReplicaSet when none has the
// Deployment's template. So the rollout pauses the Deployment, and writes the images into the
// template of its present ReplicaSet, then into the Deployment's own. When the Deployment goes on
// after the pods were changed, its controller finds that the ReplicaSet equals the template, and
// keeps its pods.
type deployment struct {
	env *Env
	d   *appsv1.Deployment
	// current is the ReplicaSet with the Deployment's pods, sets are all its ReplicaSets.
	current *appsv1.ReplicaSet
	sets    []*appsv1.ReplicaSet
	// others says that older ReplicaSets have pods.
	others bool
}

func (e *Env) findDeployment(ctx context.Context, d *appsv1.Deployment) (*Target, error) {
	w := &deployment{env: e, d: d}
	found := &Target{Desired: 1, Workload: w, MinReady: time.Duration(d.Spec.MinReadySeconds) * time.Second}
	if d.Spec.Replicas != nil {
		found.Desired = int(*d.Spec.Replicas)
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return nil, apierror.Wrong("the selector of Deployment %s: %s", d.Name, err)
	}
	var list appsv1.ReplicaSetList
	if err := e.Client.List(ctx, &list, client.InNamespace(d.Namespace),
		client.MatchingLabelsSelector{Selector: selector}); err != nil {
		return nil, err
	}
	for i := range list.Items {
		set := &list.Items[i]
		if owner := metav1.GetControllerOf(set); owner == nil || owner.UID != d.UID {
			continue
		}
		w.sets = append(w.sets, set)
	}
	w.current = w.chooseCurrent()
	for _, set := range w.sets {
		w.others = w.others || set != w.current && (set.Status.Replicas > 0 || wanted(set) > 0)
	}
	if w.current == nil {
		e.Choose(selector)
		return found, nil
	}
	found.Pods, err = e.podsOf(ctx, d.Spec.Selector, w.current.UID)
	return found, err
}

func (w *deployment) image(container string) string {
	return podtemplate.Images(&w.d.Spec.Template)[container]
}

func (w *deployment) Object() client.Object { return w.d }

func (w *deployment) NotInPlaceReason(*corev1.Pod) string                      { return "" }
func (w *deployment) NeedsRestart(*corev1.Pod) bool                            { return false }
func (w *deployment) RevisionLabel(*evaluate.PodRef, map[string]string) string { return "" }

// ours returns true if this rollout has paused the Deployment.
func (w *deployment) ours() bool {
	return w.d.Annotations[inplace.PausedByAnnotation] == string(w.env.Rollout.UID)
}

// touched returns true if somebody has changed images of the template since the rollout last wrote
// the Deployment.
func (w *deployment) touched() bool {
	_, sum := cutLast(w.d.Annotations[inplace.TemplateAnnotation])
	return w.holds() && sum != "" && sum != objects.Hash(podtemplate.Images(&w.d.Spec.Template))
}

// holds returns true if the rollout has paused the Deployment for its present goal. The annotation
// alone does not say that: kubectl rollout undo brings back annotations that an older ReplicaSet
// has kept.
func (w *deployment) holds() bool {
	key, _ := cutLast(w.d.Annotations[inplace.TemplateAnnotation])
	return w.ours() && (w.d.Spec.Paused || key == w.env.templateKey())
}

// observed returns true if the Deployment's controller has seen the Deployment as it is.
func (w *deployment) observed() bool { return w.d.Status.ObservedGeneration >= w.d.Generation }

func (w *deployment) SyncTemplate(ctx context.Context, images map[string]string) (bool, string, error) {
	name := "Deployment " + w.d.Name
	if w.current == nil {
		return false, name + " has no ReplicaSet yet", nil
	}
	own, sets, err := w.diffs(images)
	if err != nil {
		return false, "", err
	}
	by := w.d.Annotations[inplace.PausedByAnnotation]
	switch {
	case w.d.Spec.Paused && by != "" && !w.ours():
		return false, name + " is being changed by another InPlaceRollout", nil
	case w.touched():
		return false, "", superseded("somebody has changed images in the template of %s", name)
	case (w.holds() || w.env.wroteTemplate(w.d)) && !podtemplate.SameButImages(&w.d.Spec.Template,
		&w.current.Spec.Template):
		return false, "", superseded("somebody has changed more than images in the template of %s", name)
	case w.others && (w.holds() || w.env.wroteTemplate(w.d)):
		return false, "", superseded("a rollout of %s itself is under way", name)
	case !podtemplate.SameButImages(&w.d.Spec.Template, &w.current.Spec.Template):
		return false, name + " has changes in its template that are more than images and not rolled out: let its " +
			"own rollout finish first", nil
	case w.others:
		return false, "a rollout of " + name + " itself is under way", nil
	case !w.observed():
		return false, "the controller of " + name + " has not seen its changes yet", nil
	case len(own)+len(sets) == 0 && !podtemplate.SameImages(&w.d.Spec.Template, &w.current.Spec.Template):
		return false, name + " has other images in its template that are not rolled out: let its own rollout finish " +
			"first", nil
	case len(own)+len(sets) == 0:
		return true, "", nil
	}
	// The API server is asked before the Deployment is paused.
	answers, err := dryrun.Template(ctx, w.env.Client, w.d, KindDeployment, own, true)
	if err != nil {
		return false, "", err
	}
	w.env.Memory.rewrite(answers)
	if own, sets, err = w.diffs(images); err != nil {
		return false, "", err
	}
	answers, err = dryrun.Template(ctx, w.env.Client, w.current, "ReplicaSet", sets, true)
	if err != nil {
		return false, "", err
	}
	for container, a := range answers {
		return false, "", dryrun.Unsteady("ReplicaSet "+w.current.Name, container, a.Asked,
			a.Asked+" in its Deployment", a.Got)
	}
	switch {
	case len(own)+len(sets) == 0:
		return true, "", nil
	case !w.d.Spec.Paused && w.env.wroteTemplate(w.d):
		return false, "", superseded("somebody has put other images into the template of %s", name)
	case !w.d.Spec.Paused:
		patch, err := w.marked(ctx, nil, map[string]any{inplace.PausedByAnnotation: string(w.env.Rollout.UID)},
			map[string]any{"paused": true})
		if err != nil {
			return false, "", err
		}
		if err := w.env.patchWorkload(ctx, w.d, patch, KindDeployment, nil); err != nil {
			return false, "", err
		}
		w.env.Event(corev1.EventTypeNormal, notice.EventPaused, name+" is paused until its pods are changed")
		return false, name + " has just been paused", nil
	case len(sets) > 0:
		return false, "the template of ReplicaSet " + w.current.Name + " has just been changed",
			w.env.writeImages(ctx, w.current, "ReplicaSet", sets, nil, nil)
	}
	patch, err := w.marked(ctx, own, nil, nil)
	if err != nil {
		return false, "", err
	}
	return false, "the template of " + name + " has just been changed",
		w.env.noteTemplate(w.env.patchWorkload(ctx, w.d, patch, KindDeployment, own))
}

// marked returns a patch of the Deployment with an annotation that says which images the template
// has after it, whatever admission makes of them.
func (w *deployment) marked(
	ctx context.Context, images map[string]string, annotations, spec map[string]any,
) ([]byte, error) {
	write := func(become map[string]string) ([]byte, error) {
		mark := w.env.templateMark(become)
		maps.Copy(mark, annotations)
		return podtemplate.Patch(w.d, images, mark, spec)
	}
	become := podtemplate.Images(&w.d.Spec.Template)
	maps.Copy(become, images)
	patch, err := write(become)
	if err != nil {
		return nil, err
	}
	got, err := dryrun.ImagesOfPatch(ctx, w.env.Client, w.d, KindDeployment, patch)
	if err != nil || maps.Equal(got, become) {
		return patch, err
	}
	return write(got)
}

// diffs returns the images that the Deployment lacks, and those that its ReplicaSet lacks.
func (w *deployment) diffs(images map[string]string) (own, sets map[string]string, err error) {
	images = w.env.Memory.Template.All(images)
	if own, err = podtemplate.Diff(&w.d.Spec.Template, images, "Deployment "+w.d.Name); err == nil {
		sets, err = podtemplate.Diff(&w.current.Spec.Template, images, "ReplicaSet "+w.current.Name)
	}
	return own, sets, err
}

// Resume lets a Deployment go on that the rollout has paused. Before that, the Deployment and its
// ReplicaSet get the same template, since a Deployment that differs would get a new ReplicaSet.
// Images that somebody else has put into the template stay.
func (w *deployment) Resume(ctx context.Context) (bool, error) {
	if !w.ours() {
		return w.observed() || !w.d.Spec.Paused, nil
	}
	if w.current != nil && w.d.Spec.Paused && !w.touched() && podtemplate.SameButImages(&w.d.Spec.Template,
		&w.current.Spec.Template) {
		images := map[string]string{}
		have := podtemplate.Images(&w.d.Spec.Template)
		for name, image := range podtemplate.Images(&w.current.Spec.Template) {
			if have[name] == image {
				continue
			}
			half, err := w.halfDone(ctx, name, have[name])
			if err != nil {
				return false, err
			}
			if half {
				images[name] = image
			}
		}
		if len(images) > 0 {
			return false, w.agree(ctx, images)
		}
		if !w.observed() || w.current.Status.ObservedGeneration < w.current.Generation {
			return false, nil
		}
		if kept, err := w.keepHistory(ctx); !kept || err != nil {
			return false, err
		}
	}
	off := map[string]any{inplace.PausedByAnnotation: nil, inplace.TemplateAnnotation: nil}
	if err := w.env.writeImages(ctx, w.d, KindDeployment, nil, off, map[string]any{"paused": false}); err != nil {
		return false, err
	}
	w.env.Event(corev1.EventTypeNormal, notice.EventResumed, fmt.Sprintf("Deployment %s goes on", w.d.Name))
	return false, nil
}

// agree gives the Deployment the images of its ReplicaSet or, where the API server does not have
// that, the ReplicaSet those of its Deployment.
func (w *deployment) agree(ctx context.Context, images map[string]string) error {
	patch, err := w.marked(ctx, images, nil, nil)
	if err == nil {
		err = w.env.patchWorkload(ctx, w.d, patch, KindDeployment, images)
	}
	if dryrun.Refusal(err) == nil {
		return err
	}
	back := map[string]string{}
	for name, image := range podtemplate.Images(&w.d.Spec.Template) {
		if images[name] != "" {
			back[name] = image
		}
	}
	return w.env.writeImages(ctx, w.current, "ReplicaSet", back, nil, nil)
}

// halfDone returns true if this rollout was about to replace the Deployment's image, and false if
// it is an image that somebody else wants.
func (w *deployment) halfDone(ctx context.Context, container, image string) (bool, error) {
	s := &w.env.Rollout.Status
	for _, own := range []string{s.PreviousImages[container], s.TargetImages[container]} {
		if is, err := w.becomes(ctx, container, own, image); is || err != nil {
			return is, err
		}
	}
	return false, nil
}

// becomes returns true if an image is the rollout's own, or what admission makes of that.
func (w *deployment) becomes(ctx context.Context, container, own, image string) (bool, error) {
	if own == "" || own == image {
		return own != "", nil
	}
	become, _, err := dryrun.ImagesAfter(ctx, w.env.Client, w.d, KindDeployment, map[string]string{container: own})
	if err != nil && dryrun.Refusal(err) == nil {
		return false, err
	}
	return become[container] == image, nil
}
