// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// request is all that one reconcile knows of a ContainerRecreateRequest.
type request struct {
	r      *Reconciler
	crr    *appsv1alpha1.ContainerRecreateRequest
	memory *memory
	log    logrus.FieldLogger

	accepted   *accept.Record
	pod        *corev1.Pod // nil when gone
	containers []*container
}

// operationUID derives from the request, so that a controller which sends the command again finds
// the operation that is there.
func (q *request) operationUID(c *container) string { return string(q.crr.UID) + "." + c.name }

// key is the request's name.
func (q *request) key() reconcile.Request {
	return reconcile.Request{NamespacedName: client.ObjectKeyFromObject(q.crr)}
}

// operation is the operation on a container, as the tracker knows it.
func (q *request) operation(c *container) nodes.Key {
	return nodes.Key{For: q.key(), Node: q.accepted.NodeName, UID: q.operationUID(c)}
}

// gather collects what spec, status, pod and the annotation say of each container.
func (q *request) gather() {
	q.containers = nil
	for _, want := range q.crr.Spec.Containers {
		c := &container{name: want.Name, strategy: accept.StrategyOf(q.crr.Spec.Strategy, want.Strategy)}
		c.state.Name = want.Name
		for _, s := range q.crr.Status.ContainerRecreateStates {
			if s.Name == want.Name {
				c.state = s
			}
		}
		if a := q.accepted; a != nil {
			c.pinned, c.strategy.StartFirst, c.strategy.Parallel = a.Containers[want.Name], a.StartFirst, a.Parallel
		}
		if q.pod != nil {
			c.spec, _ = pods.Container(q.pod, want.Name)
			c.status = pods.Status(q.pod, want.Name)
		}
		q.containers = append(q.containers, c)
	}
}

// done says that no container has anything to do any more.
func (q *request) done() bool {
	return !slices.ContainsFunc(q.containers, func(c *container) bool { return !c.done() })
}

// deadline is when the request completes whatever its state, or nil.
func (q *request) deadline() *time.Time {
	if q.crr.Spec.ActiveDeadlineSeconds == nil {
		return nil
	}
	t := q.crr.CreationTimestamp.Add(time.Duration(*q.crr.Spec.ActiveDeadlineSeconds) * time.Second)
	return &t
}
