// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestHookOf(t *testing.T) {
	get := func(port intstr.IntOrString) *corev1.LifecycleHandler {
		return &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/bye?x=1", Port: port, Scheme: "HTTPS", HTTPHeaders: []corev1.HTTPHeader{{Name: "A", Value: "b"}}}}
	}
	wantGet := func(port int32) *opsv1.Hook {
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: &opsv1.HTTPGetAction{
			Scheme: "HTTPS", Port: port, Path: "/bye?x=1", Headers: []*opsv1.HTTPHeader{{Name: "A", Value: "b"}},
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
		{"httpGet by number", get(intstr.FromInt32(8443)), wantGet(8443), ""},
		{"httpGet by name", get(intstr.FromString("admin")), wantGet(9000), ""},
		{"httpGet by a number in a string", get(intstr.FromString("8443")), wantGet(8443), ""},
		{"httpGet without a port", get(intstr.IntOrString{}), wantGet(80), ""},
		{"httpGet by a name there is not", get(intstr.FromString("nope")), nil, `the port "nope", which container app does not have`},
		{"httpGet out of range", get(intstr.FromInt32(70000)), nil, "not a port number"},
		{"sleep", &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 5}}, &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 5}}}, ""},
		{"tcpSocket", &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}, nil, "tcpSocket is not a handler kubelet runs"},
		{"nothing in it", &corev1.LifecycleHandler{}, nil, "no action"},
	}
	c := &corev1.Container{Name: "app", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80}, {Name: "admin", ContainerPort: 9000}}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := hookOf(c, tt.handler)
			if (err == nil) != (tt.wrong == "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
				t.Fatalf("error %v, want %q", err, tt.wrong)
			}
			if !proto.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// A hook reaches the node with the command, and one that cannot be run is told of.
func TestHooks(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "admin", ContainerPort: 9000}}
		p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
			PreStop:   &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("admin")}},
			PostStart: &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}},
		}
	})
	release := b.node.hold("app", opsv1.Phase_PHASE_STOPPING)
	b.create("a", spec{Containers: containers("app")})
	b.until("under way", b.phaseIs(recreating, "app"), "a")
	release()
	b.until("completed", isCompleted, "a")
	got := b.node.requests[0].GetContainers()[0]
	if got.GetPreStop().GetHttpGet().GetPort() != 9000 || got.GetPostStart() != nil {
		t.Errorf("node got %v", got)
	}
	wantContains(t, "events", b.eventsSoFar(), "Warning FailedPostStartHook PostStartHook failed: tcpSocket")
}
