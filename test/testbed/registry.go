// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// writeRegistry writes the configuration of a registry that serves storage on addr and returns its path.
func writeRegistry(file, addr, storage string) error {
	type m = map[string]any
	return writeYAML(file, m{
		"version": "0.1",
		"storage": m{"filesystem": m{"rootdirectory": storage}, "delete": m{"enabled": true}},
		"http":    m{"addr": addr},
		"log":     m{"level": "info"},
	})
}

// registryAnswers is nil when the registry at addr serves.
func registryAnswers(ctx context.Context, addr string) error {
	return httpOK(ctx, oneShotClient(), "http://"+addr+"/v2/")
}

// StartRegistry starts the image registry on its old address and with its old content, after [Bed.StopRegistry].
func (b *Bed) StartRegistry(ctx context.Context) error {
	config := filepath.Join(b.Dir, "etc", "registry.yaml")
	if err := writeRegistry(config, b.Registry, filepath.Join(b.Dir, "registry")); err != nil {
		return err
	}
	p, err := b.start("registry", "registry", "serve", config)
	if err != nil {
		return err
	}
	return p.ready(ctx, func(ctx context.Context) error { return registryAnswers(ctx, b.Registry) })
}

// StopRegistry ends the image registry: pulls fail from then on.
func (b *Bed) StopRegistry(ctx context.Context) error { return b.stop(ctx, "registry", unix.SIGKILL) }

// oneShotClient keeps no connection, and so no goroutine, after a request.
func oneShotClient() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
}

// httpOK is nil when a GET answers 200.
func httpOK(ctx context.Context, c *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}

// freePort returns want when nothing listens there on ip, else a port that the kernel picks.
func freePort(ip string, want int) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(ip, fmt.Sprint(want)))
	if err != nil && want != 0 {
		l, err = net.Listen("tcp", net.JoinHostPort(ip, "0"))
	}
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
