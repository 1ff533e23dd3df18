// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
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

// onDeleteStrategy is that of StatefulSets and of DaemonSets.
const onDeleteStrategy = string(appsv1.OnDeleteStatefulSetStrategyType)

// env is what a workload needs from the reconciler of its rollout.
type env struct {
	// client reads from the cache and writes, live reads past the cache: revisions are not kept.
	client client.Client
	live   client.Reader
	// rollout is the rollout that the workload is the target of.
	rollout *inplace.InPlaceRollout
	// goal says what the pods have to become now. The reconciler changes it when the rollout goes back.
	goal *goal
	now  time.Time
	log  logrus.FieldLogger
	// wrote counts a write to the API server.
	wrote func(object string)
	// event writes an Event about the rollout, tell writes it only once for a revision and key.
	event func(kind, reason, text string)
	tell  func(kind, reason, text, key string)
	// patchRollout writes the change of the rollout's metadata since before, unless somebody else wrote in between.
	patchRollout func(ctx context.Context, before *inplace.InPlaceRollout) error
	// choose keeps the selector of the pods.
	choose func(labels.Selector)
	memory *memory
}

// memory is what the reconciler remembers of a workload. After a restart all of it can be found out again.
type memory struct {
	// template are the images that admission makes of the goal's images in the template.
	template rewrites
	// templated are the revisions of the goals for which the template was written.
	templated map[string]bool
	// history is the goal for which a ReplicaSet was created to keep a Deployment's history.
	history   string
	revisions *revisions
}

// forget forgets what is about a goal.
func (m *memory) forget() { m.template, m.templated = nil, nil }

// Workload is a target that has a pod template.
type workload interface {
	// image returns the image of a container in the template; empty if there is no such container.
	image(container string) string
	// SyncTemplate writes the images into the template. Pods have to wait until it is ready; why says what it waits for. The
	// error is a *SpecError if the user can correct it.
	align(ctx context.Context, images map[string]string) (ready bool, why string, err error)
	// NotInPlaceReason says why a pod cannot get what the template has in place; empty if it can.
	obstacle(pod *corev1.Pod) string
	// NeedsRestart returns true if the template asks for a restart of all pods that is later than the pod.
	restart(pod *corev1.Pod) bool
	// revisionLabel returns the label of revision that the pod has to have with these images; with nil, as it is. It is empty if the
	// pod does not belong to the template's revision then.
	revisionLabel(i *podRef, images map[string]string) string
	// Resume lets the workload's own controller go on, and returns true once that controller has taken notice.
	settle(ctx context.Context) (bool, error)
	// Object returns the workload as it was read.
	written() client.Object
}

// Read reads the workload of a target; nil if it does not exist. The error is a *SpecError if the user can correct it: if the pods of
// the workload cannot be changed in place.
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

// noWorkload says in words that there is no such workload.
func noWorkload(namespace string, ref *inplace.WorkloadRef) string {
	return fmt.Sprintf("there is no %s %s in namespace %s", ref.Kind, ref.Name, namespace)
}

func (e *env) findWorkload(ctx context.Context, ref *inplace.WorkloadRef) (*target, error) {
	object, err := readWorkload(ctx, e.client, e.rollout.Namespace, ref)
	if err != nil {
		return nil, err
	}
	if object == nil {
		return nil, wrong("%s", noWorkload(e.rollout.Namespace, ref))
	}
	var found *target
	switch o := object.(type) {
	case *appsv1.Deployment:
		found, err = e.findDeployment(ctx, o)
	case *appsv1.StatefulSet:
		found, err = e.findStatefulSet(ctx, o)
	case *appsv1.DaemonSet:
		found, err = e.findDaemonSet(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	found.what = ref.Kind + " " + ref.Name
	return found, nil
}

// podsOf returns the pods that a selector selects and that an object controls.
func (e *env) podsOf(ctx context.Context, selector *metav1.LabelSelector, owner types.UID) ([]*corev1.Pod, error) {
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return nil, wrong("the selector of %s: %s", e.rollout.Spec.Target.WorkloadRef.Name, err)
	}
	e.choose(s)
	pods, err := e.list(ctx, s)
	return slices.DeleteFunc(pods, func(pod *corev1.Pod) bool { c := metav1.GetControllerOf(pod); return c == nil || c.UID != owner }), err
}

// rewrite keeps what admission makes of images in the template.
func (m *memory) rewrite(more rewrites) {
	if m.template == nil {
		m.template = rewrites{}
	}
	maps.Copy(m.template, more)
}

// patchWorkload writes a patch, unless someone else wrote in between, and checks that the template has got the expected images.
func (e *env) patchWorkload(ctx context.Context, o client.Object, patch []byte, object string, images map[string]string) error {
	what := object + " " + o.GetName()
	if err := e.client.Patch(ctx, o, client.RawPatch(types.StrategicMergePatchType, patch), client.FieldOwner(fieldOwner)); err != nil {
		return denied(fmt.Errorf("changing %s: %w", what, err), what)
	}
	e.wrote(object)
	got := templateImages(podTemplate(o))
	for _, name := range slices.Sorted(maps.Keys(images)) {
		if got[name] != images[name] {
			return unsteady(what, name, images[name], images[name], got[name])
		}
	}
	return nil
}
