// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// Target is what a rollout is about: pods, and perhaps the workload that creates them.
type Target struct {
	// Pods are all pods, also those that have ended or are being deleted.
	Pods []*corev1.Pod
	// Desired is how many pods there should be.
	Desired int
	// What names the target for people.
	What string
	// Workload is nil unless the target is one.
	Workload Workload
	// FirstOrdinal is the lowest ordinal of a StatefulSet. Ordered says that its pods go one after
	// the other.
	FirstOrdinal int
	Ordered      bool
	// MinReady is minReadySeconds of the workload, or the greatest value of the pods' owners.
	MinReady time.Duration
	// Mirrors is how many mirror pods of static pods the selector selects: they are left out.
	Mirrors int
}

// Find reads the target. The error is a *apierror.SpecError if the user can correct it.
func (e *Env) Find(ctx context.Context) (*Target, error) {
	t := e.Rollout.Spec.Target
	switch {
	case t.PodName != "":
		return e.findPod(ctx, t.PodName)
	case t.Selector != nil:
		selector, err := SelectorOf(t.Selector)
		if err != nil {
			return nil, err
		}
		e.Choose(selector)
		all, err := e.list(ctx, selector)
		if err != nil {
			return nil, err
		}
		found := &Target{What: "pods with " + metav1.FormatLabelSelector(t.Selector)}
		found.Pods = slices.DeleteFunc(all, mirrorpod.Is)
		found.Mirrors = len(all) - len(found.Pods)
		for _, pod := range found.Pods {
			if pods.Active(pod) {
				found.Desired++
			}
		}
		found.MinReady, err = e.ownersMinReady(ctx, found.Pods)
		return found, err
	case t.WorkloadRef != nil:
		return e.findWorkload(ctx, t.WorkloadRef)
	}
	return nil, apierror.Wrong("spec.target names neither podName, nor selector, nor workloadRef: set one of them")
}

// SelectorOf reads the selector of a target. The error is a *apierror.SpecError.
func SelectorOf(s *metav1.LabelSelector) (labels.Selector, error) {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, apierror.Wrong("spec.target.selector: %s", err)
	}
	return selector, nil
}

func (e *Env) findPod(ctx context.Context, name string) (*Target, error) {
	found := &Target{What: "pod " + name, Desired: 1}
	var pod corev1.Pod
	err := e.Client.Get(ctx, client.ObjectKey{Namespace: e.Rollout.Namespace, Name: name}, &pod)
	if apierrors.IsNotFound(err) {
		return found, nil
	}
	if err != nil {
		return nil, err
	}
	found.Pods = []*corev1.Pod{&pod}
	found.MinReady, err = e.ownersMinReady(ctx, found.Pods)
	return found, err
}

// ownersMinReady returns the greatest minReadySeconds of the workloads that own the pods. An owner
// that does not exist any more asks for nothing.
func (e *Env) ownersMinReady(ctx context.Context, pods []*corev1.Pod) (time.Duration, error) {
	most := int32(0)
	seen := map[types.UID]bool{}
	for _, pod := range pods {
		owner := metav1.GetControllerOf(pod)
		if owner == nil || seen[owner.UID] || owner.APIVersion != appsv1.SchemeGroupVersion.String() {
			continue
		}
		seen[owner.UID] = true
		var object client.Object
		var minReady *int32
		switch owner.Kind {
		case "ReplicaSet":
			o := &appsv1.ReplicaSet{}
			object, minReady = o, &o.Spec.MinReadySeconds
		case KindStatefulSet:
			o := &appsv1.StatefulSet{}
			object, minReady = o, &o.Spec.MinReadySeconds
		case KindDaemonSet:
			o := &appsv1.DaemonSet{}
			object, minReady = o, &o.Spec.MinReadySeconds
		default:
			continue
		}
		if err := e.Client.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name},
			object); client.IgnoreNotFound(err) != nil {
			return 0, err
		}
		most = max(most, *minReady)
	}
	return time.Duration(most) * time.Second, nil
}

// list reads pods. The caller must not change them.
func (e *Env) list(ctx context.Context, selector labels.Selector) ([]*corev1.Pod, error) {
	var list corev1.PodList
	if err := e.Client.List(ctx, &list, client.InNamespace(e.Rollout.Namespace),
		client.MatchingLabelsSelector{Selector: selector}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

// LeftOut says how many pods are left out because they are static ones; empty when there are none.
func LeftOut(mirrors int) string {
	switch mirrors {
	case 0:
		return ""
	case 1:
		return "1 static pod is left out"
	}
	return fmt.Sprintf("%d static pods are left out", mirrors)
}
