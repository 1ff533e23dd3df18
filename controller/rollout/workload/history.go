// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"fmt"
	"maps"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// The old ReplicaSets of a Deployment are its history: kubectl rollout undo takes the template of
// the one with the second highest revision. A rollout in place overwrites the template of the
// present ReplicaSet. Its old template would be lost, and undo would go back one revision too far.
// So the rollout keeps a ReplicaSet without pods that has the old template.

// copiedNot are annotations that belong to one ReplicaSet alone, or to a rollout.
var copiedNot = []string{
	deploymentRevision, "deployment.kubernetes.io/revision-history", "deployment.kubernetes.io/desired-replicas",
	"deployment.kubernetes.io/max-replicas",
	inplace.PausedByAnnotation, inplace.TemplateAnnotation,
}

// wanted is how many pods a ReplicaSet should have.
func wanted(set *appsv1.ReplicaSet) int32 {
	if set.Spec.Replicas == nil {
		return 1
	}
	return *set.Spec.Replicas
}

// revisionNumber returns the revision of a ReplicaSet; -1 if it has none.
func revisionNumber(set *appsv1.ReplicaSet) int {
	n, err := strconv.Atoi(set.Annotations[deploymentRevision])
	if err != nil {
		return -1
	}
	return n
}

// chooseCurrent returns the ReplicaSet with the highest revision. While the rollout has paused the
// Deployment, it returns the one with pods: the Deployment's controller gives the highest revision
// to any ReplicaSet that happens to have the template.
func (w *deployment) chooseCurrent() *appsv1.ReplicaSet {
	var newest, active *appsv1.ReplicaSet
	actives := 0
	for _, set := range w.sets {
		if n := revisionNumber(set); n >= 0 && (newest == nil || n > revisionNumber(newest) ||
			n == revisionNumber(newest) && wanted(set) > wanted(newest)) {
			newest = set
		}
		if wanted(set) > 0 {
			active = set
			actives++
		}
	}
	if actives == 1 && w.ours() && w.d.Spec.Paused {
		return active
	}
	return newest
}

// previousTemplate returns the template that the present ReplicaSet had before the rollout; nil if
// it is unknown, or the same.
func (w *deployment) previousTemplate(ctx context.Context) (*corev1.PodTemplateSpec, map[string]string, error) {
	s := &w.env.Rollout.Status
	if w.env.Goal.Undo || Newer(w.env.Rollout) != "" {
		return nil, nil, nil
	}
	t := w.current.Spec.Template.DeepCopy()
	pod := &corev1.Pod{Spec: t.Spec}
	images := map[string]string{}
	for name, target := range s.TargetImages {
		c := pods.Changeable(pod, name)
		if c == nil || s.PreviousImages[name] == "" {
			return nil, nil, nil
		}
		was := s.PreviousImages[name]
		if c.Image == was {
			continue
		}
		if is, err := w.becomes(ctx, name, target, c.Image); err != nil || !is {
			return nil, nil, err // the ReplicaSet has not the rollout's image, or not any more
		}
		c.Image, images[name] = was, was
	}
	if len(images) == 0 {
		return nil, nil, nil
	}
	return t, images, nil
}

// keepHistory makes sure that a ReplicaSet with the old template has the second highest revision,
// and returns true if it has. If an older ReplicaSet has the new template, it gets the old one: the
// Deployment's controller would take it for the present one, and replace the pods.
func (w *deployment) keepHistory(ctx context.Context) (bool, error) {
	previous, images, err := w.previousTemplate(ctx)
	if previous == nil || err != nil {
		return err == nil, err
	}
	var there *appsv1.ReplicaSet
	highest := 0
	for _, set := range w.sets {
		if set == w.current {
			continue
		}
		if podtemplate.SameTemplate(&set.Spec.Template, &w.d.Spec.Template) && before(set, w.current) {
			return w.noHistory(w.env.writeImages(ctx, set, "ReplicaSet", images, clean(nil), nil))
		}
		if podtemplate.SameTemplate(&set.Spec.Template, previous) && (there == nil ||
			revisionNumber(set) > revisionNumber(there)) {
			there = set
		}
		highest = max(highest, revisionNumber(set))
	}
	number := strconv.Itoa(max(revisionNumber(w.current), highest+1))
	switch limit := w.d.Spec.RevisionHistoryLimit; {
	case there != nil && revisionNumber(there) == highest:
		return highest <= revisionNumber(w.current), nil // its controller is about to give that a higher one
	case there != nil:
		return w.noHistory(w.env.writeImages(ctx, there, "ReplicaSet", nil,
			clean(map[string]any{deploymentRevision: number}), nil))
	case limit != nil && *limit == 0:
		return true, nil // nobody wants any
	case w.env.Memory.history == w.env.templateKey():
		return true, nil // admission has made another template of it
	}
	set := w.copyOf(previous, number)
	err = w.env.Client.Create(ctx, set)
	switch {
	case err == nil:
		w.env.Wrote("ReplicaSet")
		w.env.Memory.history = w.env.templateKey()
		w.env.Log.WithField("replicaset", set.Name).Info("the template of before is kept for kubectl rollout undo")
	case apierrors.IsAlreadyExists(err): // the cache does not show it yet
	case dryrun.IsAPIStatus(err):
		w.tellNoHistory(err)
	default:
		return false, err
	}
	return true, nil
}

// noHistory returns done if the API server refuses the history for good, which does not hold up the
// Deployment. Otherwise the history has to be looked at again.
func (w *deployment) noHistory(err error) (done bool, _ error) {
	if dryrun.Refusal(err) == nil {
		return false, err
	}
	w.tellNoHistory(err)
	return true, nil
}

func (w *deployment) tellNoHistory(err error) {
	text := fmt.Sprintf("kubectl rollout undo of Deployment %s will go back further than to what was before: no "+
		"ReplicaSet can be made for its history: %s", w.d.Name, err)
	w.env.Log.Warn(text)
	w.env.Tell(corev1.EventTypeWarning, notice.EventHistory, text, "")
}

// clean removes the annotations that the Deployment had while it was paused: its controller copies
// them, and undo would bring them back.
func clean(annotations map[string]any) map[string]any {
	all := map[string]any{inplace.PausedByAnnotation: nil, inplace.TemplateAnnotation: nil}
	maps.Copy(all, annotations)
	return all
}

// copyOf returns a ReplicaSet of the Deployment with a template and without pods.
func (w *deployment) copyOf(t *corev1.PodTemplateSpec, number string) *appsv1.ReplicaSet {
	// a ReplicaSet that was made from this template may be the present one
	label := objects.Hash(t.Spec, t.Annotations, number)
	t.Labels = maps.Clone(t.Labels)
	if t.Labels == nil {
		t.Labels = map[string]string{}
	}
	t.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = label
	selector := w.d.Spec.Selector.DeepCopy()
	if selector.MatchLabels == nil {
		selector.MatchLabels = map[string]string{}
	}
	selector.MatchLabels[appsv1.DefaultDeploymentUniqueLabelKey] = label
	notes := maps.Clone(w.current.Annotations)
	if notes == nil {
		notes = map[string]string{}
	}
	for _, key := range copiedNot {
		delete(notes, key)
	}
	notes[deploymentRevision] = number
	yes, none := true, int32(0)
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: w.d.Namespace, Name: w.d.Name + "-" + label, Labels: maps.Clone(t.Labels), Annotations: notes,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: KindDeployment, Name: w.d.Name,
				UID: w.d.UID, Controller: &yes}},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: &none, MinReadySeconds: w.d.Spec.MinReadySeconds, Selector: selector,
			Template: *t},
	}
}

// before returns true if the Deployment's controller takes a for the older ReplicaSet of the two.
func before(a, b *appsv1.ReplicaSet) bool {
	if a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.Name < b.Name
	}
	return a.CreationTimestamp.Before(&b.CreationTimestamp)
}
