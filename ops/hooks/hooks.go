// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package hooks runs the lifecycle hooks of containers as kubelet does
// (pkg/kubelet/lifecycle/handlers.go).
package hooks

import (
	"bytes"
	"context"
	"crypto/tls"
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
	"github.com/cri-proxy/cri-proxy/ops/crinode"
)

// Runner runs hooks. Close it after use.
type Runner struct {
	runtime runtimeapi.RuntimeServiceClient
	http    *http.Client
}

// NewRunner returns a Runner whose commands run through the runtime.
func NewRunner(runtime runtimeapi.RuntimeServiceClient) *Runner {
	return &Runner{runtime: runtime, http: newHTTPClient()}
}

// Close closes idle connections.
func (r *Runner) Close() { r.http.CloseIdleConnections() }

// Run runs a lifecycle hook of the container until it is done or ctx ends.
func (r *Runner) Run(ctx context.Context, h *opsv1.Hook, container, sandbox string) error {
	switch a := h.GetAction().(type) {
	case *opsv1.Hook_Exec:
		return r.exec(ctx, a.Exec, container)
	case *opsv1.Hook_HttpGet:
		return r.httpGet(ctx, a.HttpGet, sandbox)
	case *opsv1.Hook_Sleep:
		return crinode.Sleep(ctx, time.Duration(a.Sleep.GetSeconds())*time.Second)
	default:
		return errors.New("the hook has no action that can be run (exec, httpGet, sleep)")
	}
}

// maxOutput is how many bytes of a command's output an error message quotes.
const maxOutput = 512

func (r *Runner) exec(ctx context.Context, a *opsv1.ExecAction, container string) error {
	req := &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: a.GetCommand()}
	if by, ok := ctx.Deadline(); ok {
		// With a timeout the runtime kills the command; a cancelled call would leave it running.
		// The timeout is in whole seconds and rounded up, so that the hook gets the last part too.
		req.Timeout = max(1, int64((time.Until(by)+time.Second-1)/time.Second))
	}
	resp, err := r.runtime.ExecSync(ctx, req)
	if err != nil {
		return fmt.Errorf("command %q: %w", a.GetCommand(), err)
	}
	if resp.GetExitCode() != 0 {
		out := bytes.TrimSpace(append(resp.GetStdout(), resp.GetStderr()...))
		return fmt.Errorf("command %q exited with %d: %.*s", a.GetCommand(), resp.GetExitCode(), maxOutput, out)
	}
	return nil
}

// httpGet sends the request of kubelet's handler. Kubelet checks no certificate, accepts an answer
// with any status, and falls back from https to http, without credentials, when the server answers
// in plain HTTP.
func (r *Runner) httpGet(ctx context.Context, a *opsv1.HTTPGetAction, sandbox string) error {
	host := a.GetHost()
	if host == "" {
		var err error
		if host, err = r.podIP(ctx, sandbox); err != nil {
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
	req, err := newRequest(ctx, u, a.GetHeaders())
	if err != nil {
		return err
	}
	err = r.do(req)
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		req = req.Clone(ctx)
		req.URL.Scheme = "http"
		req.Header.Del("Authorization")
		err = r.do(req)
	}
	return err
}

// newRequest returns kubelet's request (pkg/probe/http/request.go newProbeRequest), with a
// User-Agent of our own.
func newRequest(ctx context.Context, u *url.URL, headers []*opsv1.HTTPHeader) (*http.Request, error) {
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

// do sends the request and reads as much of the answer as kubelet does.
func (r *Runner) do(req *http.Request) error {
	resp, err := r.http.Do(req)
	if err != nil {
		return err
	}
	// The answer has come. Reading its body only lets the server finish.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 10<<10))
	return resp.Body.Close()
}

// maxRedirects is kubelet's limit (pkg/probe/http RedirectChecker).
const maxRedirects = 10

// newHTTPClient returns a client for hooks only. It checks no certificates, because those of pods
// cannot be verified. It follows redirects on the same host only, so that a pod cannot make the
// node call another host.
func newHTTPClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as kubelet; see httpGet
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

// podIP returns the pod's first address. A pod in the host's network has no address of its own in
// the runtime: podIP returns the loopback.
func (r *Runner) podIP(ctx context.Context, sandbox string) (string, error) {
	st, err := r.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil {
		return "", fmt.Errorf("finding the pod's address: %w", err)
	}
	if ip := st.GetStatus().GetNetwork().GetIp(); ip != "" {
		return ip, nil
	}
	return "127.0.0.1", nil
}
