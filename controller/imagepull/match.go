// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// Nodes with this label have no container runtime.
const (
	nodeTypeLabel  = "type"
	virtualKubelet = "virtual-kubelet"
)

// podSelectorOf is the selector of pods, or nil when nodes are chosen otherwise.
func podSelectorOf(job *v1beta1.ImagePullJob) *metav1.LabelSelector {
	if p := job.Spec.PodSelector; p != nil && !emptySelector(&p.LabelSelector) {
		return &p.LabelSelector
	}
	return nil
}

// match returns the nodes of the job in the order of their turn. The error is a *specError if the user can correct it.
func match(ctx context.Context, from client.Reader, job *v1beta1.ImagePullJob, port int) ([]target, error) {
	chosen, err := nodeFilter(ctx, from, job)
	if err != nil {
		return nil, err
	}
	var list corev1.NodeList
	if err := from.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	var targets []target
	for i := range list.Items {
		if n := &list.Items[i]; n.Labels[nodeTypeLabel] != virtualKubelet && n.DeletionTimestamp == nil && chosen(n) {
			targets = append(targets, targetOf(n, port))
		}
	}
	inTurn(job.UID, targets)
	return targets, nil
}

func nodeFilter(ctx context.Context, from client.Reader, job *v1beta1.ImagePullJob) (func(*corev1.Node) bool, error) {
	if pods := podSelectorOf(job); pods != nil {
		return hostFilter(ctx, from, job.Namespace, pods)
	}
	s := job.Spec.Selector
	switch {
	case s != nil && len(s.Names) > 0:
		names := map[string]bool{}
		for _, name := range s.Names {
			names[name] = true
		}
		return func(n *corev1.Node) bool { return names[n.Name] }, nil
	case s != nil && !emptySelector(&s.LabelSelector):
		selector, err := selectorOf("spec.selector", &s.LabelSelector)
		if err != nil {
			return nil, err
		}
		return func(n *corev1.Node) bool { return selector.Matches(labels.Set(n.Labels)) }, nil
	}
	return func(*corev1.Node) bool { return true }, nil
}

// selectorOf reads the selector in a field. The error is a *specError.
func selectorOf(field string, s *metav1.LabelSelector) (labels.Selector, error) {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, wrong("%s: %s", field, err)
	}
	return selector, nil
}

// hostFilter chooses the nodes of active pods. A node that makes a mirror pod is not chosen by it: it would be sent the secrets of a
// namespace whose pods it has never had.
func hostFilter(ctx context.Context, from client.Reader, namespace string, pods *metav1.LabelSelector) (func(*corev1.Node) bool, error) {
	selector, err := selectorOf("spec.podSelector", pods)
	if err != nil {
		return nil, err
	}
	var list corev1.PodList
	if err := from.List(ctx, &list, client.InNamespace(namespace), client.MatchingLabelsSelector{Selector: selector}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	hosts := map[string]bool{}
	for i := range list.Items {
		if p := &list.Items[i]; activePod(p) && !mirrorpod.Is(p) {
			hosts[p.Spec.NodeName] = true
		}
	}
	return func(n *corev1.Node) bool { return hosts[n.Name] }, nil
}

func activePod(p *corev1.Pod) bool {
	return p.Spec.NodeName != "" && p.DeletionTimestamp == nil && p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

func targetOf(n *corev1.Node, port int) target {
	t := target{node: nodes.Node{Name: n.Name}}
	node, err := nodes.Of(n, port)
	if err != nil {
		t.reason, t.message = reasonNoAddress, err.Error()
		return t
	}
	t.node = node
	if t.ready = nodeReady(n); !t.ready {
		t.reason, t.message = reasonNotReady, fmt.Sprintf("node %s is not ready", n.Name)
	}
	return t
}

func nodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
