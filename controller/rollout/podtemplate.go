// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"encoding/json"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Images returns the images of the containers that can be changed in place.
func templateImages(t *corev1.PodTemplateSpec) map[string]string {
	images := map[string]string{}
	pod := &corev1.Pod{Spec: t.Spec}
	for _, name := range containersOf(pod) {
		c, _ := containerOf(pod, name)
		images[name] = c.Image
	}
	return images
}

// Of returns the pod template of a workload.
func podTemplate(object client.Object) *corev1.PodTemplateSpec {
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

// Diff returns those of the images that a template does not have yet. The error is a *SpecError.
func templateDiff(t *corev1.PodTemplateSpec, images map[string]string, what string) (map[string]string, error) {
	have := templateImages(t)
	diff := map[string]string{}
	for name, image := range images {
		switch was, ok := have[name]; {
		case !ok:
			return nil, wrong("%s", lacks("the template of "+what, name, toChange, slices.Sorted(maps.Keys(have))))
		case was != image:
			diff[name] = image
		}
	}
	return diff, nil
}

// imageLists returns the part of a strategic merge patch of a pod's spec that changes images.
func imageLists(s *corev1.PodSpec, images map[string]string) map[string][]any {
	lists := map[string][]any{}
	pod := &corev1.Pod{Spec: *s}
	for _, name := range slices.Sorted(maps.Keys(images)) {
		list := "containers"
		if _, sidecar := containerOf(pod, name); sidecar {
			list = "initContainers"
		}
		lists[list] = append(lists[list], map[string]any{"name": name, "image": images[name]})
	}
	return lists
}

// Patch returns the strategic merge patch that puts images into the template of a workload. The patch also sets annotations of the
// workload and other fields of its spec.
func templatePatch(o client.Object, t *corev1.PodTemplateSpec, images map[string]string, annotations, spec map[string]any) ([]byte, error) {
	body := map[string]any{}
	maps.Copy(body, spec)
	if lists := imageLists(&t.Spec, images); len(lists) > 0 {
		body["template"] = map[string]any{"spec": lists}
	}
	meta := map[string]any{"uid": o.GetUID(), "resourceVersion": o.GetResourceVersion()}
	if annotations != nil {
		meta["annotations"] = annotations
	}
	return json.Marshal(map[string]any{"metadata": meta, "spec": body})
}

// sameInPlace returns true if templates differ only in images and in the annotation that has all pods restarted.
func sameInPlace(a, b *corev1.PodTemplateSpec) bool {
	if a == nil || b == nil {
		return false
	}
	bare := func(t *corev1.PodTemplateSpec) *corev1.PodTemplateSpec {
		t = t.DeepCopy()
		if delete(t.Annotations, restartedAt); len(t.Annotations) == 0 {
			t.Annotations = nil
		}
		return t
	}
	return sameButImages(bare(a), bare(b))
}

// sameButImages returns true if templates differ only in images.
func sameButImages(a, b *corev1.PodTemplateSpec) bool {
	bare := func(t *corev1.PodTemplateSpec) *corev1.PodTemplateSpec {
		t = t.DeepCopy()
		delete(t.Labels, appsv1.DefaultDeploymentUniqueLabelKey)
		if len(t.Labels) == 0 {
			t.Labels = nil
		}
		pod := &corev1.Pod{Spec: t.Spec}
		for _, name := range containersOf(pod) {
			c, _ := containerOf(pod, name)
			c.Image = ""
		}
		return t
	}
	return apiequality.Semantic.DeepEqual(bare(a), bare(b))
}

// sameImages returns true if templates have the same images.
func sameImages(a, b *corev1.PodTemplateSpec) bool {
	x, y := templateImages(a), templateImages(b)
	for name, image := range x {
		if y[name] != image {
			return false
		}
	}
	return len(x) == len(y)
}

// sameTemplate returns true if templates differ only in the label of the ReplicaSet.
func sameTemplate(a, b *corev1.PodTemplateSpec) bool { return sameButImages(a, b) && sameImages(a, b) }

// podImages returns the images of the containers of a pod that can be changed in place.
func podImages(pod *corev1.Pod) map[string]string {
	return templateImages(&corev1.PodTemplateSpec{Spec: pod.Spec})
}

// revisionLabel is the label by which StatefulSets and DaemonSets know the revision of a pod.
const revisionLabel = appsv1.ControllerRevisionHashLabelKey
