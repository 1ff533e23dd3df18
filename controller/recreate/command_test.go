// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// The node is told what the pod says of the user, so that it need not guess when the image's tag
// has moved.
func TestRestartTellsTheUser(t *testing.T) {
	yes, user := true, int64(7)
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes}
		p.Spec.Containers[1].SecurityContext = &corev1.SecurityContext{RunAsUser: &user}
	})
	b.create("a", spec{Containers: containers("app", "web")})
	b.until("completed", isCompleted, "a")
	app, web := b.node.Requests()[0].GetContainers()[0], b.node.Requests()[1].GetContainers()[0]
	if !app.GetRunAsNonRoot() || app.RunAsUser != nil || !web.GetRunAsNonRoot() || web.GetRunAsUser() != 7 {
		t.Errorf("node got %v and %v", app, web)
	}
}
