// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// Nodes with this label have no container runtime.
const (
	nodeTypeLabel  = "type"
	virtualKubelet = "virtual-kubelet"
)

// Reasons why a node cannot be commanded.
const (
	ReasonNotReady  = "NodeNotReady"
	ReasonNoAddress = "NoAddress"
)

// PodSelector is the selector of pods, or nil when the job chooses its nodes by something else.
func PodSelector(job *v1beta1.ImagePullJob) *metav1.LabelSelector {
	if p := job.Spec.PodSelector; p != nil && !emptySelector(&p.LabelSelector) {
		return &p.LabelSelector
	}
	return nil
}

// Match returns the nodes of the job in the order in which they pull. port is for nodes that
// announce none. The error is an *apierror.SpecError if the user can correct it.
func Match(ctx context.Context, from client.Reader, job *v1beta1.ImagePullJob, port int) ([]Target, error) {
	chosen, err := nodeFilter(ctx, from, job)
	if err != nil {
		return nil, err
	}
	var list corev1.NodeList
	if err := from.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	var targets []Target
	for i := range list.Items {
		n := &list.Items[i]
		if n.Labels[nodeTypeLabel] != virtualKubelet && n.DeletionTimestamp == nil && chosen(n) {
			targets = append(targets, targetOf(n, port))
		}
	}
	sortForJob(job.UID, targets)
	return targets, nil
}

func nodeFilter(ctx context.Context, from client.Reader, job *v1beta1.ImagePullJob) (func(*corev1.Node) bool, error) {
	if pods := PodSelector(job); pods != nil {
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

// selectorOf reads the selector in a field. The error is an *apierror.SpecError.
func selectorOf(field string, s *metav1.LabelSelector) (labels.Selector, error) {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, apierror.Wrong("%s: %s", field, err)
	}
	return selector, nil
}

// hostFilter chooses the nodes of active pods. Mirror pods do not count: a node could create one to
// be sent the secrets of a namespace of which it has never run a pod.
func hostFilter(
	ctx context.Context, from client.Reader, namespace string, pods *metav1.LabelSelector,
) (func(*corev1.Node) bool, error) {
	selector, err := selectorOf("spec.podSelector", pods)
	if err != nil {
		return nil, err
	}
	var list corev1.PodList
	matching := client.MatchingLabelsSelector{Selector: selector}
	if err := from.List(ctx, &list, client.InNamespace(namespace), matching, client.UnsafeDisableDeepCopy); err != nil {
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
	return p.Spec.NodeName != "" && p.DeletionTimestamp == nil &&
		p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

func targetOf(n *corev1.Node, port int) Target {
	t := Target{Node: nodes.Node{Name: n.Name}}
	node, err := nodes.Of(n, port)
	if err != nil {
		t.Reason, t.Message = ReasonNoAddress, err.Error()
		return t
	}
	t.Node = node
	if t.Ready = nodeReady(n); !t.Ready {
		t.Reason, t.Message = ReasonNotReady, fmt.Sprintf("node %s is not ready", n.Name)
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

// sortForJob sorts nodes: in the same order each time for one job, and in another order for another
// job, so that jobs which begin together do not all begin with the same node.
func sortForJob(uid types.UID, nodes []Target) {
	place := func(t Target) uint64 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(string(uid) + "/" + t.Node.Name)) // never fails
		// The last bytes reach the high bits of FNV only through this.
		x := h.Sum64()
		x ^= x >> 33
		x *= 0xff51afd7ed558ccd
		x ^= x >> 33
		return x
	}
	places := make(map[string]uint64, len(nodes))
	for _, n := range nodes {
		places[n.Node.Name] = place(n)
	}
	slices.SortFunc(nodes, func(a, b Target) int {
		x, y := places[a.Node.Name], places[b.Node.Name]
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return strings.Compare(a.Node.Name, b.Node.Name)
	})
}

func emptySelector(s *metav1.LabelSelector) bool {
	return s == nil || len(s.MatchLabels) == 0 && len(s.MatchExpressions) == 0
}
