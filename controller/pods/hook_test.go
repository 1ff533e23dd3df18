// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

func TestHook(t *testing.T) {
	get := func(port intstr.IntOrString, host ...string) *corev1.LifecycleHandler {
		return &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{
			Path: "/bye?x=1", Port: port, Scheme: "HTTPS", HTTPHeaders: []corev1.HTTPHeader{{Name: "A", Value: "b"}},
			Host: strings.Join(host, ""),
		}}
	}
	wantGet := func(port int32, host string) *opsv1.Hook {
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: &opsv1.HTTPGetAction{
			Scheme: "HTTPS", Host: host, Port: port, Path: "/bye?x=1",
			Headers: []*opsv1.HTTPHeader{{Name: "A", Value: "b"}},
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
		{"httpGet by a number in a string", get(intstr.FromString("8443")), nil,
			`the port "8443", which container app does not have`},
		{"httpGet without a port", get(intstr.IntOrString{}), nil, "port 0 is not a port number"},
		{"httpGet by a name there is not", get(intstr.FromString("nope")), nil,
			`the port "nope", which container app does not have`},
		{"httpGet out of range", get(intstr.FromInt32(70000)), nil, "not a port number"},
		{"sleep", &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 5}},
			&opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 5}}}, ""},
		{"tcpSocket", &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}, nil,
			"tcpSocket is not a handler kubelet runs"},
		{"nothing in it", &corev1.LifecycleHandler{}, nil, "no action"},
	}
	c := &corev1.Container{Name: "app", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80},
		{Name: "admin", ContainerPort: 9000}}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := pods.Hook(c, tt.handler, "192.0.2.7")
			if (err == nil) != (tt.wrong == "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
				t.Fatalf("error %v, want %q", err, tt.wrong)
			}
			if !proto.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
