// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// writeRegistry writes the configuration of a registry that serves storage on addr and returns its
// path.
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

// StartRegistry starts the image registry on its old address and with its old content, after
// [Bed.StopRegistry].
func (b *Bed) StartRegistry(ctx context.Context) error {
	config := filepath.Join(b.Dir, "etc", "registry.yaml")
	if err := writeRegistry(config, b.Registry, b.storage()); err != nil {
		return err
	}
	p, err := b.start("registry", "registry", "serve", config)
	if err != nil {
		return err
	}
	return p.ready(ctx, func(ctx context.Context) error { return registryAnswers(ctx, b.Registry) })
}

// RegistryOptions of [Bed.StartRegistryAs].
type RegistryOptions struct {
	// Auth is the auth section of its configuration, see [Bed.BasicAuth]. Without one everybody may
	// pull.
	Auth map[string]any
	// TLS is its serving certificate, see [Bed.ServingCert]; without one it speaks plain HTTP.
	TLS Pair
}

// User and password of a registry with [Bed.BasicAuth].
const (
	RegistryUser     = "robot"
	RegistryPassword = "correct-horse-7TqLw2"
	// bcrypt of it, at the lowest cost.
	registryHash = "$2a$04$xX2U/0nLn6de2BOUidK2m.5Qwjye3drBJV.I5Pt1U3IESsJw5sWiG"
)

// BasicAuth is the auth section of a registry that lets in only [RegistryUser].
func (b *Bed) BasicAuth() (map[string]any, error) {
	file := filepath.Join(b.Dir, "etc", "htpasswd")
	if err := os.WriteFile(file, []byte(RegistryUser+":"+registryHash+"\n"), 0o600); err != nil {
		return nil, err
	}
	return map[string]any{"htpasswd": map[string]any{"realm": "bed", "path": file}}, nil
}

// ServingCert issues a certificate for servers on the first node's bridge address, signed by the
// cluster CA.
func (b *Bed) ServingCert(name string) (Pair, error) {
	return b.PKI.cluster.issue(b.PKI.Dir, name, subject{name: name, ips: ips(b.BridgeIP, "127.0.0.1")})
}

// StartRegistryAs starts another registry, a process called name, that serves the images of the
// first and returns its address. [Bed.Close] ends it.
func (b *Bed) StartRegistryAs(ctx context.Context, name string, o RegistryOptions) (addr string, err error) {
	port, err := freePort(b.BridgeIP, 0)
	if err != nil {
		return "", err
	}
	addr = net.JoinHostPort(b.BridgeIP, fmt.Sprint(port))
	type m = map[string]any
	http := m{"addr": addr}
	if o.TLS.Cert != "" {
		http["tls"] = m{"certificate": o.TLS.Cert, "key": o.TLS.Key}
	}
	config := m{"version": "0.1", "storage": m{"filesystem": m{"rootdirectory": b.storage()}}, "http": http,
		"log": m{"level": "info"}}
	if o.Auth != nil {
		config["auth"] = o.Auth
	}
	file := filepath.Join(b.Dir, "etc", name+".yaml")
	if err := writeYAML(file, config); err != nil {
		return "", err
	}
	p, err := b.start(name, "registry", "serve", file)
	if err != nil {
		return "", err
	}
	return addr, p.ready(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// storage is where the images of the bed's registries are.
func (b *Bed) storage() string { return filepath.Join(b.Dir, "registry") }

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
