// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// onDelete is a StatefulSet or DaemonSet with updateStrategy OnDelete, which leaves its pods alone. A pod that has the images of the
// template and the label of its revision is up to date for the workload's controller.
type onDelete struct {
	env      *env
	object   client.Object
	kind     string
	template *corev1.PodTemplateSpec
	selector *metav1.LabelSelector
	observed int64
	pods     []*corev1.Pod
	// update is the label of the template's revision. For a StatefulSet it is in the status.
	update    string
	revisions *revisions
}

// revisions are the templates that pods were created from, by label.
type revisions struct {
	generation int64
	at         time.Time
	newest     string
	templates  map[string]*corev1.PodTemplateSpec
}

// revisionsInterval is how often the revisions are read again while a pod has an unknown one.
const revisionsPause = 10 * time.Second

func (e *env) findStatefulSet(ctx context.Context, s *appsv1.StatefulSet) (*target, error) {
	pods, err := e.podsOf(ctx, s.Spec.Selector, s.UID)
	if err != nil {
		return nil, err
	}
	found := &target{pods: pods, desired: 1, ordered: true, workload: &onDelete{
		env: e, pods: pods, object: s, kind: kindStatefulSet, template: &s.Spec.Template, selector: s.Spec.Selector, observed: s.Status.ObservedGeneration, update: s.Status.UpdateRevision,
	}}
	found.minReady = time.Duration(s.Spec.MinReadySeconds) * time.Second
	if s.Spec.Replicas != nil {
		found.desired = int(*s.Spec.Replicas)
	}
	if o := s.Spec.Ordinals; o != nil {
		found.firstOrdinal = int(o.Start)
	}
	return found, nil
}

func (e *env) findDaemonSet(ctx context.Context, d *appsv1.DaemonSet) (*target, error) {
	pods, err := e.podsOf(ctx, d.Spec.Selector, d.UID)
	if err != nil {
		return nil, err
	}
	found := &target{pods: pods, desired: int(d.Status.DesiredNumberScheduled), workload: &onDelete{
		env: e, pods: pods, object: d, kind: kindDaemonSet, template: &d.Spec.Template, selector: d.Spec.Selector, observed: d.Status.ObservedGeneration,
	}}
	found.minReady = time.Duration(d.Spec.MinReadySeconds) * time.Second
	return found, nil
}

// ownName names a workload whose annotation the rollout was made for; empty for others.
func ownName(w workload) string {
	if o, ok := w.(*onDelete); ok && o.follows() {
		return o.name()
	}
	return ""
}

func (w *onDelete) name() string { return w.kind + " " + w.object.GetName() }

func (w *onDelete) image(container string) string { return templateImages(w.template)[container] }

func (w *onDelete) align(ctx context.Context, images map[string]string) (bool, string, error) {
	diff, err := templateDiff(w.template, w.env.memory.template.all(images), w.name())
	if err != nil {
		return false, "", err
	}
	if len(diff) > 0 && !w.mayWrite(diff) {
		return false, "the template of " + w.name() + " has other images by now", nil // the rollout will have them too
	}
	if len(diff) > 0 {
		answers, err := askTemplate(ctx, w.env.client, w.object, w.kind, diff, false)
		if err != nil {
			return false, "", err
		}
		w.env.memory.rewrite(answers)
		if diff, err = templateDiff(w.template, w.env.memory.template.all(images), w.name()); err != nil {
			return false, "", err
		}
	}
	if len(diff) > 0 && w.env.wroteTemplate(w.object) {
		if w.env.goal.undo {
			return true, "", w.readRevisions(ctx) // it was put back, and somebody wants it otherwise: the pods go back all the same
		}
		return false, "", superseded("somebody has put other images into the template of %s", w.name())
	}
	if len(diff) > 0 {
		become := templateImages(w.template)
		maps.Copy(become, diff)
		patch, err := templatePatch(w.object, w.template, diff, w.env.templateMark(become), nil)
		if err != nil {
			return false, "", err
		}
		if w.env.goal.undo && w.follows() {
			if err := w.env.notePutBack(ctx, w.object); err != nil {
				return false, "", err
			}
		}
		w.env.log.WithField("images", diff).Info("changing the template of " + w.name())
		return false, "the template of " + w.name() + " has just been changed", w.env.noteTemplate(w.env.patchWorkload(ctx, w.object, patch, w.kind, diff))
	}
	if w.observed < w.object.GetGeneration() {
		return false, "the controller of " + w.name() + " has not seen its template yet", nil
	}
	if err := w.readRevisions(ctx); err != nil {
		return false, "", err
	}
	if t := w.revisions.templates[w.update]; t == nil || !sameButImages(t, w.template) || !sameImages(t, w.template) {
		w.env.memory.revisions = nil
		return false, "the controller of " + w.name() + " has not made a revision of its template yet", nil
	}
	return true, "", nil
}

// follows returns true if the rollout was created for the workload by its annotation.
func (w *onDelete) follows() bool { return metav1.IsControlledBy(w.env.rollout, w.object) }

// mayWrite returns true if the rollout may change images of the template. A rollout that follows the template leaves it alone, except to
// put back what has failed.
func (w *onDelete) mayWrite(diff map[string]string) bool {
	if !w.follows() {
		return true
	}
	have := templateImages(w.template)
	for name := range diff {
		if !w.env.goal.undo || have[name] != w.env.rollout.Status.TargetImages[name] {
			return false
		}
	}
	return true
}

// readRevisions reads the revisions past the cache: once for a generation, and again while pods have unknown ones.
func (w *onDelete) readRevisions(ctx context.Context) error {
	r := w.env.memory.revisions
	if r == nil || r.generation != w.object.GetGeneration() || w.env.now.Sub(r.at) >= revisionsPause && w.strange(r) {
		selector, err := metav1.LabelSelectorAsSelector(w.selector)
		if err != nil {
			return err
		}
		var list appsv1.ControllerRevisionList
		if err := w.env.live.List(ctx, &list, client.InNamespace(w.object.GetNamespace()), client.MatchingLabelsSelector{Selector: selector}); err != nil {
			return fmt.Errorf("reading the revisions of %s: %w", w.name(), err)
		}
		r = &revisions{generation: w.object.GetGeneration(), at: w.env.now, templates: map[string]*corev1.PodTemplateSpec{}}
		newest := int64(-1)
		for i := range list.Items {
			c := &list.Items[i]
			if owner := metav1.GetControllerOf(c); owner == nil || owner.UID != w.object.GetUID() {
				continue
			}
			var data struct {
				Spec struct {
					Template corev1.PodTemplateSpec `json:"template"`
				} `json:"spec"`
			}
			if err := json.Unmarshal(c.Data.Raw, &data); err != nil {
				continue // not one that the controller makes
			}
			label := c.Name
			if w.kind == kindDaemonSet {
				label = c.Labels[revisionLabel]
			}
			r.templates[label] = &data.Spec.Template
			if c.Revision > newest {
				newest, r.newest = c.Revision, label
			}
		}
		w.env.memory.revisions = r
	}
	w.revisions = r
	if w.kind == kindDaemonSet {
		w.update = r.newest
	}
	return nil
}

// hasUnknownRevision returns true if a pod has a revision that was not read.
func (w *onDelete) strange(r *revisions) bool {
	for _, pod := range w.pods {
		if r.templates[pod.Labels[revisionLabel]] == nil {
			return true
		}
	}
	return false
}

func (w *onDelete) obstacle(pod *corev1.Pod) string {
	label := pod.Labels[revisionLabel]
	if w.revisions == nil || label == w.update {
		return ""
	}
	t := w.revisions.templates[label]
	if t == nil {
		return fmt.Sprintf("pod %s is of a revision (%s) that is not known any more", pod.Name, label)
	}
	if !sameInPlace(t, w.revisions.templates[w.update]) {
		return fmt.Sprintf("pod %s was made from a template that differs from the present one in more than images", pod.Name)
	}
	return ""
}

func (w *onDelete) restart(pod *corev1.Pod) bool {
	if w.revisions == nil {
		return false
	}
	was, is := w.revisions.templates[pod.Labels[revisionLabel]], w.revisions.templates[w.update]
	return was != nil && is != nil && was.Annotations[restartedAt] != is.Annotations[restartedAt]
}

func (w *onDelete) revisionLabel(i *podRef, images map[string]string) string {
	pod := i.pod
	if w.revisions == nil || w.update == "" || w.obstacle(pod) != "" {
		return ""
	}
	restart := w.restart(pod)
	if restart && images != nil {
		return "" // its containers are restarted first
	}
	if w.willHave(i, images, w.template) && (!restart || !w.env.goal.undo) {
		return w.update
	}
	if !w.env.goal.undo {
		return ""
	}
	// Somebody has the template otherwise. The pod is of the revision that it goes back to.
	own := pod.Labels[revisionLabel]
	was := w.revisions.templates[own]
	for _, label := range append([]string{own}, slices.Sorted(maps.Keys(w.revisions.templates))...) {
		if t := w.revisions.templates[label]; t != nil && was != nil && sameButImages(t, was) && w.willHave(i, images, t) {
			return label
		}
	}
	return ""
}

// willHave returns true if a pod that gets these images has the images of a template then.
func (w *onDelete) willHave(i *podRef, images map[string]string, t *corev1.PodTemplateSpec) bool {
	own := w.revisions.templates[i.pod.Labels[revisionLabel]]
	for name, want := range templateImages(t) {
		c, _ := containerOf(i.pod, name)
		if c == nil {
			return false
		}
		if own != nil && w.env.goal.images[name] == "" && templateImages(own)[name] == want {
			continue // whatever admission makes of it
		}
		if to := images[name]; to != "" && to != want || to == "" && !i.known.has(i.mark, name, c.Image, want) {
			return false
		}
	}
	return true
}

func (w *onDelete) written() client.Object { return w.object }

func (w *onDelete) settle(context.Context) (bool, error) { return true, nil }
