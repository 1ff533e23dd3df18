// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// What is written into workloads: other versions of the controller, and other field managers, must
// find it as it is.
const FieldOwner = fieldOwner

var (
	Disown       = disown
	TemplateMark = (*Env).templateMark
)

// HistoryName is the name of the ReplicaSet that keeps a template for the history of a Deployment.
func HistoryName(d *appsv1.Deployment, t *corev1.PodTemplateSpec, number string) string {
	return (&deployment{d: d, current: &appsv1.ReplicaSet{}}).copyOf(t, number).Name
}
