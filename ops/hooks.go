// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// hookOutput is how much of a hook's output goes into a message.
const hookOutput = 512

// runHook runs a lifecycle handler of the container until it is done or ctx ends.
func (e *Engine) runHook(ctx context.Context, h *opsv1.Hook, container, sandbox string) error {
	switch a := h.GetAction().(type) {
	case *opsv1.Hook_Exec:
		return e.runExecHook(ctx, a.Exec, container)
	case *opsv1.Hook_HttpGet:
		return e.runHTTPHook(ctx, a.HttpGet, sandbox)
	case *opsv1.Hook_Sleep:
		return sleep(ctx, time.Duration(a.Sleep.GetSeconds())*time.Second)
	default:
		return errors.New("the hook has no action that can be run (exec, httpGet, sleep)")
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *Engine) runExecHook(ctx context.Context, a *opsv1.ExecAction, container string) error {
	req := &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: a.GetCommand()}
	if by, ok := ctx.Deadline(); ok {
		// The runtime kills the command itself then; a cancelled call alone would leave it running. In whole seconds, and
		// rounded up: the last part of the grace is the hook's as well.
		req.Timeout = max(1, int64((time.Until(by)+time.Second-1)/time.Second))
	}
	resp, err := e.rt.ExecSync(ctx, req)
	if err != nil {
		return fmt.Errorf("command %q: %w", a.GetCommand(), err)
	}
	if resp.GetExitCode() != 0 {
		out := bytes.TrimSpace(append(resp.GetStdout(), resp.GetStderr()...))
		return fmt.Errorf("command %q exited with %d: %.*s", a.GetCommand(), resp.GetExitCode(), hookOutput, out)
	}
	return nil
}

// runHTTPHook does what kubelet's handler does (pkg/kubelet/lifecycle/handlers.go): no certificate check, every
// answer is fine whatever its status, and https falls back to http, without credentials, when the server
// answers in plain HTTP.
func (e *Engine) runHTTPHook(ctx context.Context, a *opsv1.HTTPGetAction, sandbox string) error {
	host := a.GetHost()
	if host == "" {
		var err error
		if host, err = e.podIP(ctx, sandbox); err != nil {
			return err
		}
	}
	scheme := strings.ToLower(a.GetScheme())
	if scheme == "" {
		scheme = "http"
	}
	u, err := url.Parse(a.GetPath())
	if err != nil {
		u = &url.URL{Path: a.GetPath()} // as kubelet does (pkg/probe/http/request.go formatURL)
	}
	u.Scheme, u.Host = scheme, net.JoinHostPort(host, strconv.Itoa(int(a.GetPort())))
	req, err := hookRequest(ctx, u, a.GetHeaders())
	if err != nil {
		return err
	}
	err = e.httpDo(req)
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		req = req.Clone(ctx)
		req.URL.Scheme = "http"
		req.Header.Del("Authorization")
		err = e.httpDo(req)
	}
	return err
}

// hookRequest is kubelet's request (pkg/probe/http/request.go newProbeRequest) under a name of our own.
func hookRequest(ctx context.Context, u *url.URL, headers []*opsv1.HTTPHeader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, h := range headers {
		req.Header.Add(h.GetName(), h.GetValue())
	}
	if req.Header.Values("User-Agent") == nil {
		req.Header.Set("User-Agent", "kube-lifecycle/cri-proxy")
	}
	if req.Header.Values("Accept") == nil {
		req.Header.Set("Accept", "*/*")
	} else if req.Header.Get("Accept") == "" {
		req.Header.Del("Accept")
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	return req, nil
}

// httpDo sends the request and reads its answer, as far as kubelet does.
func (e *Engine) httpDo(req *http.Request) error {
	resp, err := e.hooks.Do(req)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 10<<10)) // so that the server gets its answer off; it was received
	return resp.Body.Close()
}

// maxRedirects is what kubelet follows (pkg/probe/http RedirectChecker).
const maxRedirects = 10

// hookClient is for hooks only: certificates of pods are not verifiable, and
// redirects stay on the host, so that a pod cannot make the node call another one.
func hookClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as kubelet; see runHTTPHook
			DisableKeepAlives: true,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			switch {
			case req.URL.Hostname() != via[0].URL.Hostname():
				return http.ErrUseLastResponse
			case len(via) >= maxRedirects:
				return fmt.Errorf("stopped after %d redirects", maxRedirects)
			}
			return nil
		},
	}
}

// podIP returns the pod's first address; for a pod in the host's network, which
// has none of its own in the runtime, the loopback.
func (e *Engine) podIP(ctx context.Context, sandbox string) (string, error) {
	st, err := e.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil {
		return "", fmt.Errorf("finding the pod's address: %w", err)
	}
	if ip := st.GetStatus().GetNetwork().GetIp(); ip != "" {
		return ip, nil
	}
	return "127.0.0.1", nil
}

// recordedPreStop returns the preStop hook that kubelet wrote on the container, or
// nil. An error means that there is one which cannot be run.
func recordedPreStop(annotations map[string]string) (*opsv1.Hook, error) {
	raw := annotations[annotationPreStop]
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
		return nil, fmt.Errorf("preStop hook in annotation %s: %w", annotationPreStop, err)
	}
	switch {
	case h.Exec != nil:
		return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: h.Exec.Command}}}, nil
	case h.Sleep != nil:
		return &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: h.Sleep.Seconds}}}, nil
	case h.HTTPGet != nil:
		port, err := resolvePort(h.HTTPGet.Port, annotations[annotationPorts])
		if err != nil {
			return nil, fmt.Errorf("preStop httpGet: %w", err)
		}
		a := &opsv1.HTTPGetAction{Scheme: h.HTTPGet.Scheme, Host: h.HTTPGet.Host, Path: h.HTTPGet.Path, Port: port}
		for _, kv := range h.HTTPGet.HTTPHeaders {
			a.Headers = append(a.Headers, &opsv1.HTTPHeader{Name: kv.Name, Value: kv.Value})
		}
		return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: a}}, nil
	default:
		return nil, errors.New("the preStop hook has no action that can be run (exec, httpGet, sleep)")
	}
}

// resolvePort reads an int-or-string port; names are looked up in the container's ports (pkg/probe/util.go
// ResolveContainerPort).
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
			return 0, fmt.Errorf("ports in annotation %s: %w", annotationPorts, err)
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
