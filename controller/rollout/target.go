// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

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

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
)

// target is what a rollout is about.
type target struct {
	// pods are all of them, those that have ended or are being deleted too.
	pods []*corev1.Pod
	// desired is how many there should be.
	desired int
	// what names the target for people.
	what string
	// workload is nil unless the target is one.
	workload workload
	// firstOrdinal is that of a StatefulSet.
	firstOrdinal int
	ordered      bool
	// minReady is the minReadySeconds of the workload, or the greatest of the pods' owners.
	minReady time.Duration
	// mirrors is how many pods of kubelets' own the selector chooses: they are left out.
	mirrors int
}

// specError is what the user has to correct.
type specError = apierror.SpecError

func wrong(format string, args ...any) error {
	return &specError{Message: fmt.Sprintf(format, args...)}
}

// find reads the target. The error is a *specError if the user can correct it.
func (p *pass) find(ctx context.Context) (*target, error) {
	t := p.rollout.Spec.Target
	switch {
	case t.PodName != "":
		return p.findPod(ctx, t.PodName)
	case t.Selector != nil:
		selector, err := selectorOf(t.Selector)
		if err != nil {
			return nil, err
		}
		p.work.choose(selector)
		pods, err := p.list(ctx, selector)
		if err != nil {
			return nil, err
		}
		found := &target{what: "pods with " + metav1.FormatLabelSelector(t.Selector)}
		found.pods = slices.DeleteFunc(pods, mirrorpod.Is)
		found.mirrors = len(pods) - len(found.pods)
		for _, pod := range found.pods {
			if active(pod) {
				found.desired++
			}
		}
		found.minReady, err = p.ownersMinReady(ctx, found.pods)
		return found, err
	case t.WorkloadRef != nil:
		return p.findWorkload(ctx, t.WorkloadRef)
	}
	return nil, wrong("spec.target names neither podName, nor selector, nor workloadRef: set one of them")
}

// selectorOf reads the selector of a target. The error is a *specError.
func selectorOf(s *metav1.LabelSelector) (labels.Selector, error) {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, wrong("spec.target.selector: %s", err)
	}
	return selector, nil
}

func (p *pass) findPod(ctx context.Context, name string) (*target, error) {
	found := &target{what: "pod " + name, desired: 1}
	var pod corev1.Pod
	err := p.r.Client.Get(ctx, client.ObjectKey{Namespace: p.rollout.Namespace, Name: name}, &pod)
	if apierrors.IsNotFound(err) {
		return found, nil
	}
	if err != nil {
		return nil, err
	}
	found.pods = []*corev1.Pod{&pod}
	found.minReady, err = p.ownersMinReady(ctx, found.pods)
	return found, err
}

// ownersMinReady is the greatest minReadySeconds of the workloads that own the pods. An owner that is gone asks for nothing.
func (p *pass) ownersMinReady(ctx context.Context, pods []*corev1.Pod) (time.Duration, error) {
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
		case kindStatefulSet:
			o := &appsv1.StatefulSet{}
			object, minReady = o, &o.Spec.MinReadySeconds
		case kindDaemonSet:
			o := &appsv1.DaemonSet{}
			object, minReady = o, &o.Spec.MinReadySeconds
		default:
			continue
		}
		if err := p.r.Client.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name}, object); client.IgnoreNotFound(err) != nil {
			return 0, err
		}
		most = max(most, *minReady)
	}
	return time.Duration(most) * time.Second, nil
}

// list reads pods; they must not be changed.
func (p *pass) list(ctx context.Context, selector labels.Selector) ([]*corev1.Pod, error) {
	var list corev1.PodList
	if err := p.r.Client.List(ctx, &list, client.InNamespace(p.rollout.Namespace), client.MatchingLabelsSelector{Selector: selector}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

// leftOut says how many pods are left out because they are static ones; empty when there are none.
func leftOut(mirrors int) string {
	switch mirrors {
	case 0:
		return ""
	case 1:
		return "1 static pod is left out"
	}
	return fmt.Sprintf("%d static pods are left out", mirrors)
}

// choose keeps the selector for events of pods.
func (w *work) choose(s labels.Selector) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.selector = s
}

// about says whether a pod is one that the rollout may be about.
func (w *work) about(r *inplace.InPlaceRollout, pod client.Object) bool {
	if r.Spec.Target.PodName != "" {
		return r.Spec.Target.PodName == pod.GetName()
	}
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.selector != nil && w.selector.Matches(labels.Set(pod.GetLabels()))
}
