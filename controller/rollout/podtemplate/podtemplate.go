// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package podtemplate reads and compares the pod templates of workloads, and makes the patches that
// change their images.
package podtemplate

import (
	"encoding/json"
	"maps"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// Images returns the images of the containers that can be changed in place.
func Images(t *corev1.PodTemplateSpec) map[string]string {
	images := map[string]string{}
	pod := &corev1.Pod{Spec: t.Spec}
	for _, name := range pods.Names(pod) {
		c := pods.Changeable(pod, name)
		images[name] = c.Image
	}
	return images
}

// Of returns the pod template of a workload.
func Of(object client.Object) *corev1.PodTemplateSpec {
	switch o := object.(type) {
	case *appsv1.Deployment:
		return &o.Spec.Template
	case *appsv1.StatefulSet:
		return &o.Spec.Template
	case *appsv1.DaemonSet:
		return &o.Spec.Template
	case *appsv1.ReplicaSet:
		return &o.Spec.Template
	}
	return &corev1.PodTemplateSpec{}
}

// Diff returns those of the images that a template does not have yet. The error is a
// *apierror.SpecError.
func Diff(t *corev1.PodTemplateSpec, images map[string]string, what string) (map[string]string, error) {
	have := Images(t)
	diff := map[string]string{}
	for name, image := range images {
		switch was, ok := have[name]; {
		case !ok:
			return nil, apierror.Wrong("%s", evaluate.Lacks("the template of "+what, name, evaluate.ToChange,
				objects.SortedKeys(have)))
		case was != image:
			diff[name] = image
		}
	}
	return diff, nil
}

// ImageLists returns the part of a strategic merge patch of a pod's spec that changes images.
func ImageLists(s *corev1.PodSpec, images map[string]string) map[string][]any {
	lists := map[string][]any{}
	pod := &corev1.Pod{Spec: *s}
	for _, name := range objects.SortedKeys(images) {
		list := "containers"
		if _, kind := pods.Container(pod, name); kind == pods.Sidecar {
			list = "initContainers"
		}
		lists[list] = append(lists[list], map[string]any{"name": name, "image": images[name]})
	}
	return lists
}

// Patch returns the strategic merge patch that puts images into the template of a workload. The
// patch also sets annotations of the workload and other fields of its spec.
func Patch(o client.Object, images map[string]string, annotations, spec map[string]any) ([]byte, error) {
	body := map[string]any{}
	maps.Copy(body, spec)
	if lists := ImageLists(&Of(o).Spec, images); len(lists) > 0 {
		body["template"] = map[string]any{"spec": lists}
	}
	meta := map[string]any{"uid": o.GetUID(), "resourceVersion": o.GetResourceVersion()}
	if annotations != nil {
		meta["annotations"] = annotations
	}
	return json.Marshal(map[string]any{"metadata": meta, "spec": body})
}

// SameInPlace returns true if templates differ only in images and in the annotation that has all
// pods restarted.
func SameInPlace(a, b *corev1.PodTemplateSpec) bool {
	if a == nil || b == nil {
		return false
	}
	bare := func(t *corev1.PodTemplateSpec) *corev1.PodTemplateSpec {
		t = t.DeepCopy()
		if delete(t.Annotations, evaluate.RestartedAt); len(t.Annotations) == 0 {
			t.Annotations = nil
		}
		return t
	}
	return SameButImages(bare(a), bare(b))
}

// SameButImages returns true if templates differ only in images.
func SameButImages(a, b *corev1.PodTemplateSpec) bool {
	bare := func(t *corev1.PodTemplateSpec) *corev1.PodTemplateSpec {
		t = t.DeepCopy()
		delete(t.Labels, appsv1.DefaultDeploymentUniqueLabelKey)
		if len(t.Labels) == 0 {
			t.Labels = nil
		}
		pod := &corev1.Pod{Spec: t.Spec}
		for _, name := range pods.Names(pod) {
			c := pods.Changeable(pod, name)
			c.Image = ""
		}
		return t
	}
	return apiequality.Semantic.DeepEqual(bare(a), bare(b))
}

// SameImages returns true if templates have the same images.
func SameImages(a, b *corev1.PodTemplateSpec) bool {
	x, y := Images(a), Images(b)
	for name, image := range x {
		if y[name] != image {
			return false
		}
	}
	return len(x) == len(y)
}

// SameTemplate returns true if templates differ only in the label of the ReplicaSet.
func SameTemplate(a, b *corev1.PodTemplateSpec) bool { return SameButImages(a, b) && SameImages(a, b) }

// PodImages returns the images of the containers of a pod that can be changed in place.
func PodImages(pod *corev1.Pod) map[string]string {
	return Images(&corev1.PodTemplateSpec{Spec: pod.Spec})
}

// RevisionLabel is the label by which StatefulSets and DaemonSets know the revision of a pod.
const RevisionLabel = appsv1.ControllerRevisionHashLabelKey
