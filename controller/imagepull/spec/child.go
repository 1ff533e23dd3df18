// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

var listKind = schema.GroupVersionKind{
	Group: v1beta1.GroupVersion.Group, Version: v1beta1.GroupVersion.Version, Kind: "ImageListPullJob",
}

// Child is the job for an image of a list.
func Child(list *v1beta1.ImageListPullJob, name, image string) *v1beta1.ImagePullJob {
	child := &v1beta1.ImagePullJob{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: list.Namespace, Name: name,
			Labels:          map[string]string{v1beta1.TemplateHashLabel: TemplateHash(list)},
			Annotations:     childAnnotations(list),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(list, listKind)},
		},
		Spec: v1beta1.ImagePullJobSpec{Image: image, ImagePullJobTemplate: *list.Spec.ImagePullJobTemplate.DeepCopy()},
	}
	// A child lives as long as the list. If it were deleted before its siblings are done, it would
	// count as missing.
	child.Spec.CompletionPolicy.TTLSecondsAfterFinished = nil
	return child
}

// ChildName follows from the list, the image and the template, so that no child is made twice.
func ChildName(list *v1beta1.ImageListPullJob, image string) string {
	prefix := strings.TrimRight(list.Name[:min(len(list.Name), 200)], "-.")
	return prefix + "-" + objects.Hash(list.UID, image, TemplateHash(list))
}

// ListWork identifies what the status of a list is about. A list that has ended begins again when
// its work changes.
func ListWork(list *v1beta1.ImageListPullJob) string {
	return objects.Hash(list.Spec.Images, TemplateHash(list))
}

// TemplateHash identifies what the children have in common. How long they live is the list's alone.
func TemplateHash(list *v1beta1.ImageListPullJob) string {
	template := list.Spec.ImagePullJobTemplate.DeepCopy()
	template.CompletionPolicy.TTLSecondsAfterFinished = nil
	return objects.Hash(template, childAnnotations(list))
}

// childAnnotations are those of the list that say how to pull.
func childAnnotations(list *v1beta1.ImageListPullJob) map[string]string {
	annotations := map[string]string{}
	for _, key := range []string{v1beta1.PinForAnnotation, v1beta1.BytesPerSecondAnnotation} {
		if value, ok := list.Annotations[key]; ok {
			annotations[key] = value
		}
	}
	return annotations
}
