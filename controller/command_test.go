// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestRunAs(t *testing.T) {
	yes, no, one, two := true, false, int64(1), int64(2)
	for _, tt := range []struct {
		name    string
		pod     *corev1.PodSecurityContext
		own     *corev1.SecurityContext
		nonRoot bool
		user    *int64
	}{
		{name: "nothing"},
		{name: "the pod's", pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one}, nonRoot: true, user: &one},
		{name: "the pod's, and something else of its own", pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one}, own: &corev1.SecurityContext{}, nonRoot: true, user: &one},
		{name: "its own", own: &corev1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: &two}, nonRoot: true, user: &two},
		{name: "its own before the pod's", pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one}, own: &corev1.SecurityContext{RunAsNonRoot: &no, RunAsUser: &two}, user: &two},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nonRoot, user := RunAs(&corev1.Pod{Spec: corev1.PodSpec{SecurityContext: tt.pod}}, &corev1.Container{SecurityContext: tt.own})
			if nonRoot != tt.nonRoot || user != tt.user {
				t.Errorf("got %v, %v", nonRoot, user)
			}
		})
	}
}

// The node is told what the pod says of the user, so that it need not guess when the image's tag has moved.
func TestRestartTellsTheUser(t *testing.T) {
	yes, user := true, int64(7)
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes}
		p.Spec.Containers[1].SecurityContext = &corev1.SecurityContext{RunAsUser: &user}
	})
	b.create("a", spec{Containers: containers("app", "web")})
	b.until("completed", isCompleted, "a")
	app, web := b.node.requests[0].GetContainers()[0], b.node.requests[1].GetContainers()[0]
	if !app.GetRunAsNonRoot() || app.RunAsUser != nil || !web.GetRunAsNonRoot() || web.GetRunAsUser() != 7 {
		t.Errorf("node got %v and %v", app, web)
	}
}
