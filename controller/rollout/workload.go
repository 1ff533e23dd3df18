// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// The kinds of workloads.
const (
	kindDeployment  = "Deployment"
	kindStatefulSet = "StatefulSet"
	kindDaemonSet   = "DaemonSet"
)

// revisionLabel is what StatefulSets and DaemonSets tell the revision of a pod by.
const revisionLabel = appsv1.ControllerRevisionHashLabelKey

// restartedAt is the annotation of a template that kubectl rollout restart changes.
const restartedAt = "kubectl.kubernetes.io/restartedAt"

// onDeleteStrategy is that of StatefulSets and of DaemonSets.
const onDeleteStrategy = string(appsv1.OnDeleteStatefulSetStrategyType)

// workload is a target with a template.
type workload interface {
	// image is that of a container in the template; empty when there is no such container.
	image(container string) string
	// align brings the template to the images. Unless ready, pods must wait, for what why says. The error is a *specError if the
	// user can correct it.
	align(ctx context.Context, images map[string]string) (ready bool, why string, err error)
	// obstacle says why a pod cannot be brought to the template in place; empty when it can.
	obstacle(pod *corev1.Pod) string
	// restart says that a pod was made before somebody has asked for a restart of all pods, by the template.
	restart(pod *corev1.Pod) bool
	// revisionLabel is the label of a pod that gets these images, or of one that has what it is to have if they are nil; empty when it is not
	// of the template's revision then.
	revisionLabel(i *item, images map[string]string) string
	// settle lets the workload's controller go on as before, and says whether it has taken notice.
	settle(ctx context.Context) (bool, error)
	// written is what the rollout may have written besides pods: the workload.
	written() client.Object
}

// readWorkload reads the workload of a target, and says whether its pods can be changed in place. It is nil if there is none of that name. The
// error is a *specError if the user can correct it.
func readWorkload(ctx context.Context, from client.Reader, namespace string, ref *inplace.WorkloadRef) (client.Object, error) {
	var object client.Object
	switch ref.Kind {
	case kindDeployment:
		object = &appsv1.Deployment{}
	case kindStatefulSet:
		object = &appsv1.StatefulSet{}
	case kindDaemonSet:
		object = &appsv1.DaemonSet{}
	default:
		return nil, wrong("spec.target.workloadRef: kind %s is none of Deployment, StatefulSet and DaemonSet", ref.Kind)
	}
	err := from.Get(ctx, client.ObjectKey{Namespace: namespace, Name: ref.Name}, object)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case object.GetDeletionTimestamp() != nil:
		return nil, wrong("%s %s is being deleted", ref.Kind, ref.Name)
	}
	strategy := ""
	switch o := object.(type) {
	case *appsv1.StatefulSet:
		strategy = string(o.Spec.UpdateStrategy.Type)
	case *appsv1.DaemonSet:
		strategy = string(o.Spec.UpdateStrategy.Type)
	default:
		return object, nil
	}
	if strategy != onDeleteStrategy {
		return nil, wrong("%s %s has updateStrategy %s, with which its controller replaces the pods: set updateStrategy.type to %s", ref.Kind, ref.Name, strategy, onDeleteStrategy)
	}
	return object, nil
}

func noWorkload(namespace string, ref *inplace.WorkloadRef) string {
	return fmt.Sprintf("there is no %s %s in namespace %s", ref.Kind, ref.Name, namespace)
}

func (p *pass) findWorkload(ctx context.Context, ref *inplace.WorkloadRef) (*target, error) {
	object, err := readWorkload(ctx, p.r.Client, p.rollout.Namespace, ref)
	if err != nil {
		return nil, err
	}
	if object == nil {
		return nil, wrong("%s", noWorkload(p.rollout.Namespace, ref))
	}
	var found *target
	switch o := object.(type) {
	case *appsv1.Deployment:
		found, err = p.findDeployment(ctx, o)
	case *appsv1.StatefulSet:
		found, err = p.findStatefulSet(ctx, o)
	case *appsv1.DaemonSet:
		found, err = p.findDaemonSet(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	found.what = ref.Kind + " " + ref.Name
	return found, nil
}

// podsOf are the pods that a selector chooses and that an object controls.
func (p *pass) podsOf(ctx context.Context, selector *metav1.LabelSelector, owner types.UID) ([]*corev1.Pod, error) {
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return nil, wrong("the selector of %s: %s", p.rollout.Spec.Target.WorkloadRef.Name, err)
	}
	p.work.choose(s)
	pods, err := p.list(ctx, s)
	return slices.DeleteFunc(pods, func(pod *corev1.Pod) bool { c := metav1.GetControllerOf(pod); return c == nil || c.UID != owner }), err
}

// templateImages are the images of the containers of a template that can be changed in place.
func templateImages(t *corev1.PodTemplateSpec) map[string]string {
	images := map[string]string{}
	pod := &corev1.Pod{Spec: t.Spec}
	for _, name := range containersOf(pod) {
		c, _ := containerOf(pod, name)
		images[name] = c.Image
	}
	return images
}

// podTemplate is the template of a workload.
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

// lacks says that something has no container of a name that can be changed in place, but others.
func lacks(what, name, change string, has []string) string {
	return fmt.Sprintf("%s has no container %s that can be %s in place; it has %s", what, name, change, strings.Join(has, ", "))
}

// What can be done to a container.
const (
	toChange  = "changed"
	toRestart = "restarted"
)

// templateDiff are the images that a template lacks. The error is a *specError.
func templateDiff(t *corev1.PodTemplateSpec, images map[string]string, what string) (map[string]string, error) {
	have := templateImages(t)
	diff := map[string]string{}
	for name, image := range images {
		switch was, ok := have[name]; {
		case !ok:
			return nil, wrong("%s", lacks("the template of "+what, name, toChange, sortedKeys(have)))
		case was != image:
			diff[name] = image
		}
	}
	return diff, nil
}

// askTemplate lets the API server say what it would make of images in the template of a workload. It is asked twice where it makes something else
// of them, and about that, too: a change whose image is another one each time has no end.
//
// With alone set nothing else may become of the template: a Deployment and its ReplicaSet must end up the same.
func (p *pass) askTemplate(ctx context.Context, o client.Object, kind string, images map[string]string, alone bool) (rewrites, error) {
	if len(images) == 0 {
		return nil, nil
	}
	first, all, err := p.dryTemplate(ctx, o, kind, images)
	if err != nil {
		return nil, err
	}
	have := templateImages(podTemplate(o))
	for _, name := range sortedKeys(all) {
		if alone && images[name] == "" && all[name] != have[name] {
			return nil, &admissionError{failure: failure{failRewritten, fmt.Sprintf("admission changes container %s of %s %s from %s to %s as well: let the rollout change it, too, to that image",
				name, kind, o.GetName(), have[name], all[name])}}
		}
	}
	if maps.Equal(first, images) {
		return nil, nil
	}
	for _, ask := range []map[string]string{images, first} {
		then, _, err := p.dryTemplate(ctx, o, kind, ask)
		if err != nil {
			return nil, err
		}
		for _, name := range sortedKeys(images) {
			if then[name] != first[name] {
				return nil, unsteady(kind+" "+o.GetName(), name, ask[name], first[name], then[name])
			}
		}
	}
	return rewritesOf(images, first), nil
}

// dryTemplate is what becomes of images when they are written into a template, and all of them that there are then.
func (p *pass) dryTemplate(ctx context.Context, o client.Object, kind string, images map[string]string) (become, all map[string]string, err error) {
	patch, err := templatePatch(o, podTemplate(o), images, nil, nil)
	if err != nil {
		return nil, nil, err
	}
	if all, err = p.dryPatch(ctx, o, kind, patch); err != nil {
		return nil, nil, err
	}
	become = map[string]string{}
	for name := range images {
		become[name] = all[name]
	}
	return become, all, nil
}

// dryPatch are the images of a template when a patch of its workload has been written.
func (p *pass) dryPatch(ctx context.Context, o client.Object, kind string, patch []byte) (map[string]string, error) {
	answer, ok := o.DeepCopyObject().(client.Object)
	if !ok {
		return nil, fmt.Errorf("%T is no object", o) // never
	}
	if err := p.r.Client.Patch(ctx, answer, client.RawPatch(types.StrategicMergePatchType, patch), client.DryRunAll); err != nil {
		return nil, denied(err, kind+" "+o.GetName())
	}
	return templateImages(podTemplate(answer)), nil
}

// rewrite keeps what becomes of images in the template.
func (w *work) rewrite(more rewrites) {
	if w.template == nil {
		w.template = rewrites{}
	}
	maps.Copy(w.template, more)
}

// imageLists is the part of a strategic merge patch of a pod's spec that changes images.
func imageLists(s *corev1.PodSpec, images map[string]string) map[string][]any {
	lists := map[string][]any{}
	pod := &corev1.Pod{Spec: *s}
	for _, name := range sortedKeys(images) {
		list := "containers"
		if _, sidecar := containerOf(pod, name); sidecar {
			list = "initContainers"
		}
		lists[list] = append(lists[list], map[string]any{"name": name, "image": images[name]})
	}
	return lists
}

// templatePatch is the strategic merge patch that puts images into the template of a workload, with more of its spec and metadata.
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

// patchWorkload writes a patch, unless someone else wrote in between, and looks whether the images are what they were to become.
func (p *pass) patchWorkload(ctx context.Context, o client.Object, patch []byte, object string, images map[string]string) error {
	what := object + " " + o.GetName()
	if err := p.r.Client.Patch(ctx, o, client.RawPatch(types.StrategicMergePatchType, patch), client.FieldOwner(fieldOwner)); err != nil {
		return denied(fmt.Errorf("changing %s: %w", what, err), what)
	}
	p.r.Metrics.wrote(object)
	got := templateImages(podTemplate(o))
	for _, name := range sortedKeys(images) {
		if got[name] != images[name] {
			return unsteady(what, name, images[name], images[name], got[name])
		}
	}
	return nil
}

// sameInPlace says that templates differ in nothing but images and the annotation that has all pods restarted.
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

// sameButImages says that templates differ in nothing but images.
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

// ordinalOf is the number at the end of a name; -1 without.
func ordinalOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		return -1
	}
	return n
}
