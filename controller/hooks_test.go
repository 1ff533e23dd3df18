// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestHookOf(t *testing.T) {
	get := func(port intstr.IntOrString, host ...string) *corev1.LifecycleHandler {
		return &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{
			Path: "/bye?x=1", Port: port, Scheme: "HTTPS", HTTPHeaders: []corev1.HTTPHeader{{Name: "A", Value: "b"}}, Host: strings.Join(host, ""),
		}}
	}
	wantGet := func(port int32, host string) *opsv1.Hook {
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: &opsv1.HTTPGetAction{
			Scheme: "HTTPS", Host: host, Port: port, Path: "/bye?x=1", Headers: []*opsv1.HTTPHeader{{Name: "A", Value: "b"}},
		}}}
	}
	tests := []struct {
		name    string
		handler *corev1.LifecycleHandler
		want    *opsv1.Hook
		wrong   string
	}{
		{"none", nil, nil, ""},
		{"exec", &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"sh", "-c", "x"}}},
			&opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: []string{"sh", "-c", "x"}}}}, ""},
		{"exec of nothing", &corev1.LifecycleHandler{Exec: &corev1.ExecAction{}}, nil, "no command"},
		{"httpGet by number", get(intstr.FromInt32(8443)), wantGet(8443, "192.0.2.7"), ""},
		{"httpGet by name", get(intstr.FromString("admin")), wantGet(9000, "192.0.2.7"), ""},
		{"httpGet with a host", get(intstr.FromInt32(8443), "shop.example"), wantGet(8443, "shop.example"), ""},
		{"httpGet by a number in a string", get(intstr.FromString("8443")), nil, `the port "8443", which container app does not have`},
		{"httpGet without a port", get(intstr.IntOrString{}), nil, "port 0 is not a port number"},
		{"httpGet by a name there is not", get(intstr.FromString("nope")), nil, `the port "nope", which container app does not have`},
		{"httpGet out of range", get(intstr.FromInt32(70000)), nil, "not a port number"},
		{"sleep", &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 5}}, &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 5}}}, ""},
		{"tcpSocket", &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}, nil, "tcpSocket is not a handler kubelet runs"},
		{"nothing in it", &corev1.LifecycleHandler{}, nil, "no action"},
	}
	c := &corev1.Container{Name: "app", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80}, {Name: "admin", ContainerPort: 9000}}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := hookOf(c, tt.handler, "192.0.2.7")
			if (err == nil) != (tt.wrong == "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
				t.Fatalf("error %v, want %q", err, tt.wrong)
			}
			if !proto.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// Hooks reach the node with the command, with the pod's address as the host that is left out.
func TestHooks(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) {
		p.Status.PodIP = "192.0.2.7"
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "admin", ContainerPort: 9000}}
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
			PreStop:   &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("admin")}},
			PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(1), Host: "h"}},
		}
		p.Spec.Containers[1].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}}
	})
	b.create("a", spec{Containers: containers("app", "web")})
	b.until("completed", isCompleted, "a")
	app, web := b.node.requests[0].GetContainers()[0], b.node.requests[1].GetContainers()[0]
	if get := app.GetPreStop().GetHttpGet(); get.GetPort() != 9000 || get.GetHost() != "192.0.2.7" || app.GetPostStart().GetHttpGet().GetHost() != "h" {
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
				"Warning FailedPreStopHook PreStopHook failed", "Warning FailedPreStopHook container app: PreStopHook failed", "Warning RestartWarning something else", "Warning RestartWarning container app: something else",
			},
		},
		{
			name: "postStart", container: "mesh",
			account: &opsv1.ContainerOperation{
				Phase: opsv1.Phase_PHASE_FAILED, Reason: reasonPostStartFailed,
				Message: `postStart hook failed and the new container was stopped: command ["x"] exited with 3: s3cret`,
			},
			want: []string{
				"Warning FailedPostStartHook PostStartHook failed", "Warning FailedPostStartHook container mesh: PostStartHook failed",
				"Warning RestartFailed container mesh: the postStart hook failed and the new container was stopped",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			b.node.fail(tt.container, tt.account)
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
