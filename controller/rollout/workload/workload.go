// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package workload finds the pods that a rollout is about. If a Deployment, StatefulSet or
// DaemonSet creates them, it also keeps the workload's template and revisions in step with the
// pods, so that the workload's own controller does not replace them.
package workload

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
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// The kinds of workloads.
const (
	KindDeployment  = "Deployment"
	KindStatefulSet = "StatefulSet"
	KindDaemonSet   = "DaemonSet"
)

// onDeleteStrategy is that of StatefulSets and of DaemonSets.
const onDeleteStrategy = string(appsv1.OnDeleteStatefulSetStrategyType)

// Env is what a workload needs from the reconciler of its rollout.
type Env struct {
	// Client reads from the cache and writes, Live reads past the cache: revisions are not kept.
	Client client.Client
	Live   client.Reader
	// Rollout is the rollout that the workload is the target of.
	Rollout *inplace.InPlaceRollout
	// Goal says what the pods have to become now. The reconciler changes it when the rollout goes
	// back.
	Goal *evaluate.Goal
	Now  time.Time
	Log  logrus.FieldLogger
	// Wrote counts a write to the API server.
	Wrote func(object string)
	// Event writes an Event about the rollout, Tell writes it only once for a revision and key.
	Event func(kind, reason, text string)
	Tell  func(kind, reason, text, key string)
	// PatchRollout writes the change of the rollout's metadata since before, unless somebody else
	// wrote in between.
	PatchRollout func(ctx context.Context, before *inplace.InPlaceRollout) error
	// Choose keeps the selector of the pods.
	Choose func(labels.Selector)
	Memory *Memory
}

// Memory is what the reconciler remembers of a workload. After a restart all of it can be found out
// again.
type Memory struct {
	// Template are the images that admission makes of the goal's images in the template.
	Template evaluate.Rewrites
	// templated are the revisions of the goals for which the template was written.
	templated map[string]bool
	// history is the goal for which a ReplicaSet was created to keep a Deployment's history.
	history   string
	revisions *revisions
}

// Forget forgets what is about a goal.
func (m *Memory) Forget() { m.Template, m.templated = nil, nil }

// Workload is a target that has a pod template.
type Workload interface {
	// image returns the image of a container in the template; empty if there is no such container.
	image(container string) string
	// SyncTemplate writes the images into the template. Pods have to wait until it is ready; why
	// says what it waits for. The error is a *apierror.SpecError if the user can correct it.
	SyncTemplate(ctx context.Context, images map[string]string) (ready bool, why string, err error)
	// NotInPlaceReason says why a pod cannot get what the template has in place; empty if it can.
	NotInPlaceReason(pod *corev1.Pod) string
	// NeedsRestart returns true if the template asks for a restart of all pods that is later than
	// the pod.
	NeedsRestart(pod *corev1.Pod) bool
	// RevisionLabel returns the label of revision that the pod has to have with these images; with
	// nil, as it is. It is empty if the pod does not belong to the template's revision then.
	RevisionLabel(i *evaluate.PodRef, images map[string]string) string
	// Resume lets the workload's own controller go on, and returns true once that controller has
	// taken notice.
	Resume(ctx context.Context) (bool, error)
	// Object returns the workload as it was read.
	Object() client.Object
}

// Read reads the workload of a target; nil if it does not exist. The error is a *apierror.SpecError
// if the user can correct it: if the pods of the workload cannot be changed in place.
func Read(ctx context.Context, from client.Reader, namespace string, ref *inplace.WorkloadRef) (client.Object, error) {
	var object client.Object
	switch ref.Kind {
	case KindDeployment:
		object = &appsv1.Deployment{}
	case KindStatefulSet:
		object = &appsv1.StatefulSet{}
	case KindDaemonSet:
		object = &appsv1.DaemonSet{}
	default:
		return nil, apierror.Wrong("spec.target.workloadRef: kind %s is none of Deployment, StatefulSet and DaemonSet",
			ref.Kind)
	}
	err := from.Get(ctx, client.ObjectKey{Namespace: namespace, Name: ref.Name}, object)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case object.GetDeletionTimestamp() != nil:
		return nil, apierror.Wrong("%s %s is being deleted", ref.Kind, ref.Name)
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
		return nil, apierror.Wrong("%s %s has updateStrategy %s, with which its controller replaces the pods: set "+
			"updateStrategy.type to %s", ref.Kind, ref.Name, strategy, onDeleteStrategy)
	}
	return object, nil
}

// NotThere says in words that there is no such workload.
func NotThere(namespace string, ref *inplace.WorkloadRef) string {
	return fmt.Sprintf("there is no %s %s in namespace %s", ref.Kind, ref.Name, namespace)
}

func (e *Env) findWorkload(ctx context.Context, ref *inplace.WorkloadRef) (*Target, error) {
	object, err := Read(ctx, e.Client, e.Rollout.Namespace, ref)
	if err != nil {
		return nil, err
	}
	if object == nil {
		return nil, apierror.Wrong("%s", NotThere(e.Rollout.Namespace, ref))
	}
	var found *Target
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
	found.What = ref.Kind + " " + ref.Name
	return found, nil
}

// podsOf returns the pods that a selector selects and that an object controls.
func (e *Env) podsOf(ctx context.Context, selector *metav1.LabelSelector, owner types.UID) ([]*corev1.Pod, error) {
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return nil, apierror.Wrong("the selector of %s: %s", e.Rollout.Spec.Target.WorkloadRef.Name, err)
	}
	e.Choose(s)
	pods, err := e.list(ctx, s)
	return slices.DeleteFunc(pods, func(pod *corev1.Pod) bool {
		c := metav1.GetControllerOf(pod)
		return c == nil ||
			c.UID != owner
	}), err
}

// rewrite keeps what admission makes of images in the template.
func (m *Memory) rewrite(more evaluate.Rewrites) {
	if m.Template == nil {
		m.Template = evaluate.Rewrites{}
	}
	maps.Copy(m.Template, more)
}

// writeImages writes images into the template of a workload, with annotations of the workload and
// other fields of its spec. Otherwise it is like patchWorkload.
func (e *Env) writeImages(
	ctx context.Context, o client.Object, kind string, images map[string]string, annotations, spec map[string]any,
) error {
	patch, err := podtemplate.Patch(o, images, annotations, spec)
	if err != nil {
		return err
	}
	return e.patchWorkload(ctx, o, patch, kind, images)
}

// patchWorkload writes a patch, unless someone else wrote in between, and checks that the template
// has got the expected images.
func (e *Env) patchWorkload(
	ctx context.Context, o client.Object, patch []byte, object string, images map[string]string,
) error {
	what := object + " " + o.GetName()
	if err := e.Client.Patch(ctx, o, client.RawPatch(types.StrategicMergePatchType, patch),
		client.FieldOwner(fieldOwner)); err != nil {
		return dryrun.Denied(fmt.Errorf("changing %s: %w", what, err), what)
	}
	e.Wrote(object)
	got := podtemplate.Images(podtemplate.Of(o))
	for _, name := range objects.SortedKeys(images) {
		if got[name] != images[name] {
			return dryrun.Unsteady(what, name, images[name], images[name], got[name])
		}
	}
	return nil
}
