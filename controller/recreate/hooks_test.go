// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Hooks reach the node with the command, with the pod's address as the host that is left out.
func TestHooks(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) {
		p.Status.PodIP = "192.0.2.7"
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "admin", ContainerPort: 9000}}
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
			PreStop:   &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("admin")}},
			PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(1), Host: "h"}},
		}
		p.Spec.Containers[1].Lifecycle = &corev1.Lifecycle{
			PreStop: &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}}
	})
	b.create("a", spec{Containers: containers("app", "web")})
	b.until("completed", isCompleted, "a")
	app, web := b.node.Requests()[0].GetContainers()[0], b.node.Requests()[1].GetContainers()[0]
	if get := app.GetPreStop().GetHttpGet(); get.GetPort() != 9000 || get.GetHost() != "192.0.2.7" ||
		app.GetPostStart().
			GetHttpGet().GetHost() != "h" {
		t.Errorf("node got %v", app)
	}
	if web.GetPreStop() != nil {
		t.Errorf("a handler that cannot be run was sent: %v", web)
	}
}

// Failed hooks are told in kubelet's words, without what they printed.
func TestHookEvents(t *testing.T) {
	for _, tt := range []struct {
		name, container string
		account         *opsv1.ContainerOperation
		want            []string
	}{
		{
			name: "preStop", container: "app",
			account: &opsv1.ContainerOperation{
				Warnings: []string{`preStop hook failed: command ["x"] exited with 3: s3cret`, "something else"},
			},
			want: []string{
				"Warning FailedPreStopHook PreStopHook failed",
				"Warning FailedPreStopHook container app: PreStopHook failed",
				"Warning RestartWarning something else", "Warning RestartWarning container app: something else",
			},
		},
		{
			name: "postStart", container: "mesh",
			account: &opsv1.ContainerOperation{
				Phase: opsv1.Phase_PHASE_FAILED, Reason: "PostStartHookFailed",
				Message: `postStart hook failed and the new container was stopped: command ["x"] exited with 3: s3cret`,
			},
			want: []string{
				"Warning FailedPostStartHook PostStartHook failed",
				"Warning FailedPostStartHook container mesh: PostStartHook failed",
				"Warning RestartFailed container mesh: the postStart hook failed and the new container was stopped",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			b.node.Fail(tt.container, tt.account)
			b.create("a", spec{Containers: containers(tt.container)})
			status := fmt.Sprintf("%+v", b.until("completed", isCompleted, "a").Status)
			told := b.eventsSoFar()
			for _, want := range tt.want {
				wantContains(t, "events", told, want)
			}
			if strings.Contains(told+status, "s3cret") {
				t.Errorf("an event or the status tells what the hook printed: %s\n%s", told, status)
			}
		})
	}
}
