// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// JobChanges lets through changes of what a job or list asks for, and not what the controller
// itself writes.
func JobChanges() predicate.Predicate {
	return predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{})
}

// NodeChanges lets through changes of whether a job chooses a node, and of whether and where the
// node is commanded.
func NodeChanges() predicate.Predicate {
	return predicate.Funcs{
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Node)
			after, ok2 := e.ObjectNew.(*corev1.Node)
			if !ok1 || !ok2 {
				return true
			}
			was, _ := nodes.Of(before, 0)
			is, _ := nodes.Of(after, 0)
			return was != is || nodeReady(before) != nodeReady(after) || !maps.Equal(before.Labels, after.Labels) ||
				(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil)
		},
	}
}

// PodChanges lets through what puts a pod on a node, or takes the pod off.
func PodChanges() predicate.Predicate {
	return predicate.Funcs{
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Pod)
			after, ok2 := e.ObjectNew.(*corev1.Pod)
			return !ok1 || !ok2 || before.UID != after.UID || activePod(before) != activePod(after) ||
				!maps.Equal(before.Labels, after.Labels)
		},
	}
}
