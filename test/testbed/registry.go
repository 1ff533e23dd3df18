// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const unixTerm = unix.SIGTERM

// startRegistry serves dir/registry on addr.
func startRegistry(ctx context.Context, sp *spawner, bin, name, addr, dir, logDir, pidDir string) (*Process, error) {
	config, err := json.Marshal(map[string]any{
		"version": "0.1",
		"storage": map[string]any{"filesystem": map[string]any{"rootdirectory": filepath.Join(dir, "registry")}, "delete": map[string]any{"enabled": true}},
		"http":    map[string]any{"addr": addr},
		"log":     map[string]any{"level": "info"},
	})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "registry.yml") // JSON is YAML
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return nil, err
	}
	p, err := sp.start(command{name: name, path: filepath.Join(bin, "registry"), args: []string{"serve", file},
		env: []string{"OTEL_TRACES_EXPORTER=none"}, log: filepath.Join(logDir, name+".log")}, pidDir)
	if err != nil {
		return nil, err
	}
	return p, p.ready(ctx, func(ctx context.Context) error { return httpOK(ctx, http.DefaultClient, "http://"+addr+"/v2/") })
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
