// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"encoding/json"
	"errors"
	"fmt"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// RecordedPreStop returns the preStop hook in the annotations that kubelet puts on the container,
// or nil. An error means that the container has a hook which cannot be run.
func RecordedPreStop(annotations map[string]string) (*opsv1.Hook, error) {
	raw := annotations[criclone.AnnotationPreStop]
	if raw == "" {
		return nil, nil
	}
	var h struct { // core/v1 LifecycleHandler
		Exec *struct {
			Command []string `json:"command"`
		} `json:"exec"`
		HTTPGet *struct {
			Path, Host, Scheme string
			Port               json.RawMessage `json:"port"`
			HTTPHeaders        []struct{ Name, Value string }
		} `json:"httpGet"`
		Sleep *struct {
			Seconds int64 `json:"seconds"`
		} `json:"sleep"`
	}
	if err := json.Unmarshal([]byte(raw), &h); err != nil {
		return nil, fmt.Errorf("preStop hook in annotation %s: %w", criclone.AnnotationPreStop, err)
	}
	switch {
	case h.Exec != nil:
		return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: h.Exec.Command}}}, nil
	case h.Sleep != nil:
		return &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: h.Sleep.Seconds}}}, nil
	case h.HTTPGet != nil:
		port, err := resolvePort(h.HTTPGet.Port, annotations[criclone.AnnotationPorts])
		if err != nil {
			return nil, fmt.Errorf("preStop httpGet: %w", err)
		}
		a := &opsv1.HTTPGetAction{
			Scheme: h.HTTPGet.Scheme, Host: h.HTTPGet.Host, Path: h.HTTPGet.Path, Port: port,
		}
		for _, kv := range h.HTTPGet.HTTPHeaders {
			a.Headers = append(a.Headers, &opsv1.HTTPHeader{Name: kv.Name, Value: kv.Value})
		}
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: a}}, nil
	default:
		return nil, errors.New("the preStop hook has no action that can be run (exec, httpGet, sleep)")
	}
}

// resolvePort reads an int-or-string port and looks up a name in the container's ports
// (pkg/probe/util.go ResolveContainerPort).
func resolvePort(raw json.RawMessage, portsJSON string) (int32, error) {
	var n int32
	if err := json.Unmarshal(raw, &n); err == nil {
		return portNumber(n)
	}
	var name string
	if err := json.Unmarshal(raw, &name); err != nil {
		return 0, fmt.Errorf("port %s: %w", raw, err)
	}
	var ports []struct {
		Name          string `json:"name"`
		ContainerPort int32  `json:"containerPort"`
	}
	if portsJSON != "" {
		if err := json.Unmarshal([]byte(portsJSON), &ports); err != nil {
			return 0, fmt.Errorf("ports in annotation %s: %w", criclone.AnnotationPorts, err)
		}
	}
	for _, p := range ports {
		if p.Name == name {
			return portNumber(p.ContainerPort)
		}
	}
	return 0, fmt.Errorf("the container has no port named %q", name)
}

func portNumber(n int32) (int32, error) {
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("%d is not a port number", n)
	}
	return n, nil
}
