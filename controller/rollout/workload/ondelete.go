// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// onDelete is a StatefulSet or DaemonSet with updateStrategy OnDelete, which leaves its pods alone.
// A pod that has the images of the template and the label of its revision is up to date for the
// workload's controller.
type onDelete struct {
	env      *Env
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
const revisionsInterval = 10 * time.Second

func (e *Env) findStatefulSet(ctx context.Context, s *appsv1.StatefulSet) (*Target, error) {
	pods, err := e.podsOf(ctx, s.Spec.Selector, s.UID)
	if err != nil {
		return nil, err
	}
	found := &Target{Pods: pods, Desired: 1, Ordered: true, Workload: &onDelete{
		env: e, pods: pods, object: s, kind: KindStatefulSet, template: &s.Spec.Template, selector: s.Spec.Selector,
		observed: s.Status.ObservedGeneration, update: s.Status.UpdateRevision,
	}}
	found.MinReady = time.Duration(s.Spec.MinReadySeconds) * time.Second
	if s.Spec.Replicas != nil {
		found.Desired = int(*s.Spec.Replicas)
	}
	if o := s.Spec.Ordinals; o != nil {
		found.FirstOrdinal = int(o.Start)
	}
	return found, nil
}

func (e *Env) findDaemonSet(ctx context.Context, d *appsv1.DaemonSet) (*Target, error) {
	pods, err := e.podsOf(ctx, d.Spec.Selector, d.UID)
	if err != nil {
		return nil, err
	}
	found := &Target{Pods: pods, Desired: int(d.Status.DesiredNumberScheduled), Workload: &onDelete{
		env: e, pods: pods, object: d, kind: KindDaemonSet, template: &d.Spec.Template, selector: d.Spec.Selector,
		observed: d.Status.ObservedGeneration,
	}}
	found.MinReady = time.Duration(d.Spec.MinReadySeconds) * time.Second
	return found, nil
}

// OwnName names a workload whose annotation the rollout was made for; empty for others.
func OwnName(w Workload) string {
	if o, ok := w.(*onDelete); ok && o.follows() {
		return o.name()
	}
	return ""
}

func (w *onDelete) name() string { return w.kind + " " + w.object.GetName() }

func (w *onDelete) image(container string) string { return podtemplate.Images(w.template)[container] }

func (w *onDelete) SyncTemplate(ctx context.Context, images map[string]string) (bool, string, error) {
	diff, err := podtemplate.Diff(w.template, w.env.Memory.Template.All(images), w.name())
	if err != nil {
		return false, "", err
	}
	if len(diff) > 0 && !w.mayWrite(diff) {
		return false, "the template of " + w.name() + " has other images by now", nil // the rollout will have them too
	}
	if len(diff) > 0 {
		answers, err := dryrun.Template(ctx, w.env.Client, w.object, w.kind, diff, false)
		if err != nil {
			return false, "", err
		}
		w.env.Memory.rewrite(answers)
		if diff, err = podtemplate.Diff(w.template, w.env.Memory.Template.All(images), w.name()); err != nil {
			return false, "", err
		}
	}
	if len(diff) > 0 && w.env.wroteTemplate(w.object) {
		if w.env.Goal.Undo {
			// it was put back, and somebody wants it otherwise: the pods go back all the same
			return true, "", w.readRevisions(ctx)
		}
		return false, "", superseded("somebody has put other images into the template of %s", w.name())
	}
	if len(diff) > 0 {
		become := podtemplate.Images(w.template)
		maps.Copy(become, diff)
		if w.env.Goal.Undo && w.follows() {
			if err := w.env.notePutBack(ctx, w.object); err != nil {
				return false, "", err
			}
		}
		w.env.Log.WithField("images", diff).Info("changing the template of " + w.name())
		return false, "the template of " + w.name() + " has just been changed",
			w.env.noteTemplate(w.env.writeImages(ctx, w.object, w.kind, diff, w.env.templateMark(become), nil))
	}
	if w.observed < w.object.GetGeneration() {
		return false, "the controller of " + w.name() + " has not seen its template yet", nil
	}
	if err := w.readRevisions(ctx); err != nil {
		return false, "", err
	}
	if t := w.revisions.templates[w.update]; t == nil || !podtemplate.SameTemplate(t, w.template) {
		w.env.Memory.revisions = nil
		return false, "the controller of " + w.name() + " has not made a revision of its template yet", nil
	}
	return true, "", nil
}

// follows returns true if the rollout was created for the workload by its annotation.
func (w *onDelete) follows() bool { return metav1.IsControlledBy(w.env.Rollout, w.object) }

// mayWrite returns true if the rollout may change images of the template. A rollout that follows
// the template leaves it alone, except to put back what has failed.
func (w *onDelete) mayWrite(diff map[string]string) bool {
	if !w.follows() {
		return true
	}
	have := podtemplate.Images(w.template)
	for name := range diff {
		if !w.env.Goal.Undo || have[name] != w.env.Rollout.Status.TargetImages[name] {
			return false
		}
	}
	return true
}

// readRevisions reads the revisions past the cache: once for a generation, and again while pods
// have unknown ones.
func (w *onDelete) readRevisions(ctx context.Context) error {
	r := w.env.Memory.revisions
	if r == nil || r.generation != w.object.GetGeneration() || w.env.Now.Sub(r.at) >= revisionsInterval &&
		w.hasUnknownRevision(r) {
		selector, err := metav1.LabelSelectorAsSelector(w.selector)
		if err != nil {
			return err
		}
		var list appsv1.ControllerRevisionList
		if err := w.env.Live.List(ctx, &list, client.InNamespace(w.object.GetNamespace()),
			client.MatchingLabelsSelector{Selector: selector}); err != nil {
			return fmt.Errorf("reading the revisions of %s: %w", w.name(), err)
		}
		r = &revisions{generation: w.object.GetGeneration(), at: w.env.Now,
			templates: map[string]*corev1.PodTemplateSpec{}}
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
			if w.kind == KindDaemonSet {
				label = c.Labels[podtemplate.RevisionLabel]
			}
			r.templates[label] = &data.Spec.Template
			if c.Revision > newest {
				newest, r.newest = c.Revision, label
			}
		}
		w.env.Memory.revisions = r
	}
	w.revisions = r
	if w.kind == KindDaemonSet {
		w.update = r.newest
	}
	return nil
}

// hasUnknownRevision returns true if a pod has a revision that was not read.
func (w *onDelete) hasUnknownRevision(r *revisions) bool {
	for _, pod := range w.pods {
		if r.templates[pod.Labels[podtemplate.RevisionLabel]] == nil {
			return true
		}
	}
	return false
}

func (w *onDelete) NotInPlaceReason(pod *corev1.Pod) string {
	label := pod.Labels[podtemplate.RevisionLabel]
	if w.revisions == nil || label == w.update {
		return ""
	}
	t := w.revisions.templates[label]
	if t == nil {
		return fmt.Sprintf("pod %s is of a revision (%s) that is not known any more", pod.Name, label)
	}
	if !podtemplate.SameInPlace(t, w.revisions.templates[w.update]) {
		return fmt.Sprintf("pod %s was made from a template that differs from the present one in more than images",
			pod.Name)
	}
	return ""
}

func (w *onDelete) NeedsRestart(pod *corev1.Pod) bool {
	if w.revisions == nil {
		return false
	}
	was, is := w.revisions.templates[pod.Labels[podtemplate.RevisionLabel]], w.revisions.templates[w.update]
	return was != nil && is != nil && was.Annotations[evaluate.RestartedAt] != is.Annotations[evaluate.RestartedAt]
}

func (w *onDelete) RevisionLabel(i *evaluate.PodRef, images map[string]string) string {
	pod := i.Pod
	if w.revisions == nil || w.update == "" || w.NotInPlaceReason(pod) != "" {
		return ""
	}
	restart := w.NeedsRestart(pod)
	if restart && images != nil {
		return "" // its containers are restarted first
	}
	if w.willHave(i, images, w.template) && (!restart || !w.env.Goal.Undo) {
		return w.update
	}
	if !w.env.Goal.Undo {
		return ""
	}
	// Somebody has the template otherwise. The pod is of the revision that it goes back to.
	own := pod.Labels[podtemplate.RevisionLabel]
	was := w.revisions.templates[own]
	for _, label := range append([]string{own}, objects.SortedKeys(w.revisions.templates)...) {
		if t := w.revisions.templates[label]; t != nil && was != nil && podtemplate.SameButImages(t, was) &&
			w.willHave(i, images, t) {
			return label
		}
	}
	return ""
}

// willHave returns true if a pod that gets these images has the images of a template then.
func (w *onDelete) willHave(i *evaluate.PodRef, images map[string]string, t *corev1.PodTemplateSpec) bool {
	own := w.revisions.templates[i.Pod.Labels[podtemplate.RevisionLabel]]
	for name, want := range podtemplate.Images(t) {
		c := pods.Changeable(i.Pod, name)
		if c == nil {
			return false
		}
		if own != nil && w.env.Goal.Images[name] == "" && podtemplate.Images(own)[name] == want {
			continue // whatever admission makes of it
		}
		if to := images[name]; to != "" && to != want || to == "" && !i.Facts.Has(i.State, name, c.Image, want) {
			return false
		}
	}
	return true
}

func (w *onDelete) Object() client.Object { return w.object }

func (w *onDelete) Resume(context.Context) (bool, error) { return true, nil }
