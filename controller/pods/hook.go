// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// errTCPSocketHook refuses a tcpSocket handler. kubelet has no code to run one
// (pkg/kubelet/lifecycle/handlers.go).
var errTCPSocketHook = errors.New("tcpSocket is not a handler kubelet runs")

// Hook translates a lifecycle handler of container c for the node. It resolves a named port, and
// puts podIP where the handler leaves out the host. No handler gives nil. The error says why
// kubelet could not run the handler either.
func Hook(c *corev1.Container, h *corev1.LifecycleHandler, podIP string) (*opsv1.Hook, error) {
	switch {
	case h == nil:
		return nil, nil
	case h.Exec != nil:
		if len(h.Exec.Command) == 0 {
			return nil, errors.New("exec has no command")
		}
		return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: h.Exec.Command}}}, nil
	case h.HTTPGet != nil:
		port, err := portOf(c, h.HTTPGet)
		if err != nil {
			return nil, err
		}
		get := &opsv1.HTTPGetAction{
			Scheme: string(h.HTTPGet.Scheme), Host: h.HTTPGet.Host, Port: port, Path: h.HTTPGet.Path,
		}
		if get.Host == "" {
			get.Host = podIP
		}
		for _, header := range h.HTTPGet.HTTPHeaders {
			get.Headers = append(get.Headers, &opsv1.HTTPHeader{Name: header.Name, Value: header.Value})
		}
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: get}}, nil
	case h.Sleep != nil:
		return &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: h.Sleep.Seconds}}}, nil
	case h.TCPSocket != nil:
		return nil, errTCPSocketHook
	default:
		return nil, errors.New("the handler has no action")
	}
}

// portOf resolves the port as kubelet does (pkg/probe/util.go ResolveContainerPort): a number, or
// the name of a container port.
func portOf(c *corev1.Container, get *corev1.HTTPGetAction) (int32, error) {
	port := get.Port.IntVal
	if get.Port.Type == intstr.String {
		i := slices.IndexFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == get.Port.StrVal })
		if i < 0 {
			return 0, fmt.Errorf("httpGet names the port %q, which container %s does not have", get.Port.StrVal, c.Name)
		}
		port = c.Ports[i].ContainerPort
	}
	if port < 1 || port > 65535 {
		return 0, fmt.Errorf("httpGet port %d is not a port number", port)
	}
	return port, nil
}
