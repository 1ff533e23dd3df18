// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package check finds out whether a rollout can be carried out, before it begins, and which other
// rollouts it would meet.
package check

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// checkPods is how many pods of a selector a check looks at.
const checkPods = 500

// Rollout checks whether the cluster as it is allows a rollout, as the reconciler would find out
// later, and whether another rollout is at work on the same containers. before is nil for a new
// rollout; what it had already is not checked again. The error is a *apierror.SpecError if the user
// can correct it. Warnings are about what is accepted but may be a mistake: a target may be created
// after its rollout.
func Rollout(
	ctx context.Context, from client.Reader, before, r *inplace.InPlaceRollout,
) (warnings []string, err error) {
	if before != nil {
		// The schema compares the rest of a target, and is content with any selector.
		if !apiequality.Semantic.DeepEqual(before.Spec.Target.Selector, r.Spec.Target.Selector) {
			return nil, &apierror.SpecError{Immutable: true,
				Message: "the target is immutable: create another InPlaceRollout"}
		}
		if evaluate.RevisionOf(before) == evaluate.RevisionOf(r) {
			return nil, nil
		}
	}
	for _, c := range r.Spec.Containers {
		if c.Image == "" {
			continue
		}
		if _, err := reference.ParseDockerRef(c.Image); err != nil {
			return nil, apierror.Wrong("container %s: image %q is no image reference (%s): it must be "+
				"[REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], as in a pod", c.Name, c.Image, err)
		}
	}
	switch t := r.Spec.Target; {
	case t.PodName != "":
		warnings, err = checkPod(ctx, from, r)
	case t.Selector != nil:
		warnings, err = checkSelected(ctx, from, r)
	case t.WorkloadRef != nil:
		warnings, err = checkWorkload(ctx, from, r)
	}
	if err != nil {
		return nil, err
	}
	waits, err := Rivals(ctx, from, r)
	return append(warnings, waits...), err
}

func checkPod(ctx context.Context, from client.Reader, r *inplace.InPlaceRollout) ([]string, error) {
	name := r.Spec.Target.PodName
	pod, err := readPod(ctx, from, r.Namespace, name)
	switch {
	case err != nil:
		return nil, err
	case pod == nil:
		return []string{fmt.Sprintf("there is no pod %s in namespace %s: the rollout waits for it", name, r.Namespace)},
			nil
	case pod.DeletionTimestamp != nil:
		return nil, apierror.Wrong("pod %s is being deleted: nothing in it is changed any more", name)
	case !pods.Active(pod):
		return nil, apierror.Wrong("pod %s has ended (phase %s): only containers of an active pod can be changed", name,
			pod.Status.Phase)
	}
	if err := fits(pod, r); err != nil {
		return nil, err
	}
	return ungated(r, pod, "pod "+name), sparesJob(ctx, from, pod, r)
}

func checkSelected(ctx context.Context, from client.Reader, r *inplace.InPlaceRollout) (warnings []string, err error) {
	selector, err := workload.SelectorOf(r.Spec.Target.Selector)
	if err != nil {
		return nil, err
	}
	pods, mirrors, err := somePods(ctx, from, r.Namespace, selector)
	if err != nil {
		return nil, err
	}
	if mirrors > 0 {
		warnings = append(warnings, workload.LeftOut(mirrors)+": a ContainerRecreateRequest restarts its "+
			"containers, its manifest on the node changes its images")
	}
	if len(pods) == 0 {
		return append(warnings, fmt.Sprintf("no pod in namespace %s has labels %s: the rollout waits for one",
			r.Namespace, metav1.FormatLabelSelector(r.Spec.Target.Selector))), nil
	}
	jobs := map[types.UID]bool{}
	for i := range pods {
		if err := fits(&pods[i], r); err != nil {
			return nil, err
		}
		if owner := metav1.GetControllerOf(&pods[i]); owner != nil && !jobs[owner.UID] {
			jobs[owner.UID] = true // one pod tells it of all
			if err := sparesJob(ctx, from, &pods[i], r); err != nil {
				return nil, err
			}
		}
	}
	return append(warnings, ungated(r, &pods[0], "pod "+pods[0].Name)...), nil
}

func checkWorkload(ctx context.Context, from client.Reader, r *inplace.InPlaceRollout) ([]string, error) {
	ref := r.Spec.Target.WorkloadRef
	object, err := workload.Read(ctx, from, r.Namespace, ref)
	if err != nil {
		return nil, err
	}
	if object == nil {
		return []string{workload.NotThere(r.Namespace, ref) + ": the rollout waits for it"}, nil
	}
	pod := &corev1.Pod{Spec: podtemplate.Of(object).Spec}
	what := ref.Kind + " " + ref.Name
	for _, c := range r.Spec.Containers {
		if found := pods.Changeable(pod, c.Name); found == nil {
			return nil, apierror.Wrong("%s", evaluate.Lacks("the template of "+what, c.Name, changeOf(c),
				pods.Names(pod)))
		}
	}
	return ungated(r, pod, "the template of "+what), nil
}

// fits checks whether the containers of a rollout can be changed in a pod. The error is a
// *apierror.SpecError.
func fits(pod *corev1.Pod, r *inplace.InPlaceRollout) error {
	if why := evaluate.Static(pod); why != "" {
		return apierror.Wrong("%s", why)
	}
	for _, c := range r.Spec.Containers {
		if found := pods.Changeable(pod, c.Name); found == nil {
			return apierror.Wrong("%s", evaluate.PodLacks(pod, c.Name, changeOf(c)))
		}
	}
	return nil
}

// sparesJob returns a *apierror.SpecError if the rollout would end the Job of a pod.
func sparesJob(ctx context.Context, from client.Reader, pod *corev1.Pod, r *inplace.InPlaceRollout) error {
	if r.Annotations[jobbudget.IgnoreAnnotation] == "true" {
		return nil
	}
	var names []string
	for _, c := range r.Spec.Containers {
		if found := pods.Changeable(pod, c.Name); found != nil && found.Image != c.Image {
			names = append(names, c.Name)
		}
	}
	why, err := jobbudget.WouldEnd(ctx, from, pod, names)
	if why != "" {
		return apierror.Wrong("pod %s: %s", pod.Name, why)
	}
	return err
}

func changeOf(c inplace.ContainerChange) string {
	if c.Image == "" {
		return evaluate.ToRestart
	}
	return evaluate.ToChange
}

// ungated warns that a pod cannot be taken out of service.
func ungated(r *inplace.InPlaceRollout, pod *corev1.Pod, what string) []string {
	if r.Spec.Strategy.DrainSeconds == 0 || len(evaluate.Gates(pod)) > 0 {
		return nil
	}
	return []string{fmt.Sprintf("spec.strategy.drainSeconds has no effect: %s has no readiness gate %s", what,
		inplace.ReadyGate)}
}

// Rivals returns a *apierror.SpecError if another rollout is at work on a container of this one. If
// another rollout is at work on other containers of the same pods, this one has to wait: a warning
// says so.
func Rivals(ctx context.Context, from client.Reader, r *inplace.InPlaceRollout) (warnings []string, err error) {
	var list inplace.InPlaceRolloutList
	if err := from.List(ctx, &list, client.InNamespace(r.Namespace)); err != nil {
		return nil, err
	}
	for i := range list.Items {
		other := &list.Items[i]
		if other.Name == r.Name || other.DeletionTimestamp != nil || Over(other) {
			continue
		}
		what, err := sharedTarget(ctx, from, r, other)
		if err != nil {
			return nil, err
		}
		container := sharedContainer(r, other)
		switch {
		case what == "":
		case container == "":
			warnings = append(warnings, fmt.Sprintf("InPlaceRollout %s is at work on %s: the rollout waits for its end",
				other.Name, what))
		default:
			return nil, apierror.Wrong("InPlaceRollout %s is at work on container %s of %s: wait for its end "+
				"(kubectl wait --for=condition=Complete ipr/%s), change that one instead, or delete it", other.Name,
				container, what, other.Name)
		}
	}
	return warnings, nil
}

// sharedContainer returns the first container that both rollouts are about.
func sharedContainer(a, b *inplace.InPlaceRollout) string {
	for _, c := range a.Spec.Containers {
		if slices.ContainsFunc(b.Spec.Containers, func(o inplace.ContainerChange) bool { return o.Name == c.Name }) {
			return c.Name
		}
	}
	return ""
}

// sharedTarget names the workload or pod that both rollouts are about; empty if there is none.
func sharedTarget(ctx context.Context, from client.Reader, a, b *inplace.InPlaceRollout) (string, error) {
	s, t := a.Spec.Target, b.Spec.Target
	if s.WorkloadRef != nil && t.WorkloadRef != nil {
		return sameWorkload(s.WorkloadRef, t.WorkloadRef), nil
	}
	if s.WorkloadRef != nil || s.Selector != nil && t.PodName != "" {
		s, t = t, s // the pods of the first are read
	}
	if s.PodName != "" {
		if s.PodName == t.PodName {
			return "pod " + s.PodName, nil
		}
		pod, err := readPod(ctx, from, a.Namespace, s.PodName)
		if err != nil || pod == nil || !members(t)(pod) {
			return "", err
		}
		return "pod " + pod.Name, nil
	}
	if s.Selector == nil {
		return "", nil // neither of them has a target
	}
	selector, err := metav1.LabelSelectorAsSelector(s.Selector)
	if err != nil {
		return "", nil // the other one, which the reconciler has refused
	}
	pods, _, err := somePods(ctx, from, a.Namespace, selector)
	is := members(t)
	for i := range pods {
		if is(&pods[i]) {
			return "pod " + pods[i].Name, nil
		}
	}
	return "", err
}

// sameWorkload names the workload that both references are about; empty if they differ. A pod
// belongs to one workload only.
func sameWorkload(a, b *inplace.WorkloadRef) string {
	if a.Kind != b.Kind || a.Name != b.Name {
		return ""
	}
	return a.Kind + " " + a.Name
}

// members returns a function that says whether a pod of the namespace belongs to a target.
func members(t inplace.Target) func(*corev1.Pod) bool {
	switch {
	case t.PodName != "":
		return func(pod *corev1.Pod) bool { return pod.Name == t.PodName }
	case t.Selector != nil:
		selector, err := metav1.LabelSelectorAsSelector(t.Selector)
		return func(pod *corev1.Pod) bool {
			return err == nil && !mirrorpod.Is(pod) && selector.Matches(labels.Set(pod.Labels))
		}
	case t.WorkloadRef != nil:
		return func(pod *corev1.Pod) bool { return ownedBy(pod, t.WorkloadRef) }
	}
	return func(*corev1.Pod) bool { return false }
}

// ownedBy returns true if a pod belongs to a workload, by the names of its owners.
func ownedBy(pod *corev1.Pod, ref *inplace.WorkloadRef) bool {
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return false
	}
	if owner.Kind == "ReplicaSet" {
		// It is named after its Deployment and the hash of the template.
		name, ok := strings.CutSuffix(owner.Name, "-"+pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey])
		return ok && ref.Kind == workload.KindDeployment && ref.Name == name
	}
	return owner.Kind == ref.Kind && owner.Name == ref.Name
}

// readPod reads a pod; nil if it does not exist.
func readPod(ctx context.Context, from client.Reader, namespace, name string) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	err := from.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, pod)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return pod, err
}

// somePods returns the active pods among the first checkPods that a selector selects. Mirror pods
// are left out; mirrors is how many.
func somePods(
	ctx context.Context, from client.Reader, namespace string, selector labels.Selector,
) (found []corev1.Pod, mirrors int, err error) {
	var list corev1.PodList
	err = from.List(ctx, &list, client.InNamespace(namespace), client.MatchingLabelsSelector{Selector: selector},
		client.Limit(checkPods))
	found = slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		if mirrorpod.Is(&p) {
			mirrors++
		}
		return !pods.Active(&p) || mirrorpod.Is(&p)
	})
	return found, mirrors, err
}

// Over returns true if a rollout has nothing left to do.
func Over(o *inplace.InPlaceRollout) bool {
	return o.Status.CompletionTime != nil && o.Status.ObservedRevision == evaluate.RevisionOf(o)
}

// SharedWith names the workload or pod that a rollout with these pods shares with another rollout;
// empty if there is none.
func SharedWith(own []*corev1.Pod, r, other *inplace.InPlaceRollout) string {
	if ref, theirs := r.Spec.Target.WorkloadRef, other.Spec.Target.WorkloadRef; ref != nil && theirs != nil {
		return sameWorkload(ref, theirs)
	}
	is := members(other.Spec.Target)
	for _, pod := range own {
		if pods.Active(pod) && is(pod) {
			return "pod " + pod.Name
		}
	}
	return ""
}
