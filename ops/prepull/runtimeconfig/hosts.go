// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package runtimeconfig

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"

	"github.com/cri-proxy/cri-proxy/ops/process"
)

// hosts does what containerd's registryHosts does (internal/cri/server/images/image_pull.go).
// explicit, if not empty, counts instead of config_path.
func (c *settings) hosts(ctx context.Context, options config.HostOptions, explicit string) docker.RegistryHosts {
	r := c.registry
	options.UpdateClient = c.client(options.UpdateClient)
	if options.Credentials == nil && len(r.Configs) > 0 { // no credentials came with the pull
		options.Credentials = r.credentials
	}
	if len(r.Headers) > 0 {
		options.AuthorizerOpts = append(options.AuthorizerOpts, docker.WithAuthHeader(r.Headers))
	}
	paths := explicit
	if paths == "" {
		paths = r.ConfigPath
	}
	if paths == "" && len(r.Mirrors) == 0 && c.process == (process.Process{}) {
		paths = defaultConfigPath // nothing is known
	}
	var find docker.RegistryHosts
	// containerd's transfer service takes several directories for one that does not exist
	// (containerd issue 12808). Its documentation and its older way to pull say what is meant. The
	// runtime finds what we fetch by digest, whichever way it has come.
	if dirs := filepath.SplitList(paths); len(dirs) > 0 {
		options.HostDir = below(dirs)
		find = config.ConfigureHosts(ctx, options)
	} else {
		find = func(host string) ([]docker.RegistryHost, error) { return c.mirrored(host, options) }
	}
	if len(r.Headers) == 0 {
		return find
	}
	return func(host string) ([]docker.RegistryHost, error) {
		hosts, err := find(host)
		for i := range hosts {
			// A host's own headers come after those of all hosts.
			headers := http.Header(r.Headers).Clone()
			for name, values := range hosts[i].Header {
				headers[name] = append(headers[name], values...)
			}
			hosts[i].Header = headers
		}
		return hosts, err
	}
}

// below returns a function that finds a host's directory in the first of dirs that has one.
func below(dirs []string) func(host string) (string, error) {
	return func(host string) (string, error) {
		for _, dir := range dirs {
			found, err := config.HostDirFromRoot(dir)(host)
			if err != nil && !errdefs.IsNotFound(err) || found != "" {
				return found, err
			}
		}
		return "", errdefs.ErrNotFound
	}
}

// mirrored returns where a registry is reached: at the file's mirrors, and last at its own address.
func (c *settings) mirrored(host string, options config.HostOptions) ([]docker.RegistryHost, error) {
	endpoints, err := c.registry.endpoints(host)
	if err != nil {
		return nil, err
	}
	out := make([]docker.RegistryHost, 0, len(endpoints))
	for _, u := range endpoints {
		transport := docker.DefaultHTTPTransport(&tls.Config{MinVersion: tls.VersionTLS12})
		client := &http.Client{Transport: transport}
		switch t := c.registry.Configs[u.Host].TLS; {
		case t != nil && c.legacy:
			if err := t.apply(transport.TLSClientConfig); err != nil {
				return nil, fmt.Errorf("TLS settings of registry %s: %w", u.Host, err)
			}
		case docker.IsLocalhost(host) && u.Scheme == "http":
			transport.TLSClientConfig.InsecureSkipVerify = true //nolint:gosec // as containerd, for this machine
		}
		if err := options.UpdateClient(client); err != nil {
			return nil, err
		}
		authorizer := append([]docker.AuthorizerOpt{
			docker.WithAuthClient(client), docker.WithAuthCreds(options.Credentials),
		}, options.AuthorizerOpts...)
		path := u.Path
		if path == "" {
			path = "/v2"
		}
		out = append(out, docker.RegistryHost{
			Client: client, Authorizer: docker.NewDockerAuthorizer(authorizer...), Host: u.Host, Scheme: u.Scheme,
			Path:         path,
			Capabilities: docker.HostCapabilityResolve | docker.HostCapabilityPull | docker.HostCapabilityReferrers,
		})
	}
	return out, nil
}

// endpoints returns the endpoints of a registry's mirrors, or of the mirrors for all registries,
// and the registry's own unless it is among them.
func (r *registry) endpoints(host string) ([]*url.URL, error) {
	m, ok := r.Mirrors[host]
	if !ok {
		m = r.Mirrors["*"]
	}
	var out []*url.URL
	own := false
	for _, e := range m.Endpoints {
		if !strings.Contains(e, "://") {
			u, err := url.Parse("dummy://" + e)
			if err != nil {
				return nil, fmt.Errorf("a mirror of %s is no URL", host)
			}
			e = scheme(u.Host) + "://" + e
		}
		u, err := url.Parse(e)
		if err != nil {
			return nil, fmt.Errorf("a mirror of %s is no URL", host) // err would quote it
		}
		own = own || u.Host == host
		out = append(out, u)
	}
	if own {
		return out, nil
	}
	self, err := docker.DefaultHost(host)
	if err != nil {
		return nil, err
	}
	return append(out, &url.URL{Scheme: scheme(self), Host: self}), nil
}

func scheme(host string) string {
	if docker.IsLocalhost(host) {
		return "http"
	}
	return "https"
}

// credentials returns the file's credentials for a host.
func (r *registry) credentials(host string) (name, secret string, err error) {
	a := r.Configs[host].Auth
	switch {
	case a == nil:
		return "", "", nil
	case a.Username != "":
		return a.Username, a.Password, nil
	case a.IdentityToken != "":
		return "", a.IdentityToken, nil
	case a.Auth != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return "", "", errors.New("auth of a registry in containerd's configuration is not base64")
		}
		name, secret, ok := strings.Cut(string(b), ":")
		if !ok {
			return "", "", errors.New("auth of a registry in containerd's configuration is not user:password")
		}
		return name, strings.Trim(secret, "\x00"), nil
	}
	return "", "", nil
}

// apply does what containerd 1.7's getTLSConfig does (pkg/cri/server/image_pull.go).
func (t *tlsSettings) apply(to *tls.Config) error {
	switch {
	case t.CertFile != "" && t.KeyFile == "":
		return fmt.Errorf("cert_file %s has no key_file", t.CertFile)
	case t.CertFile == "" && t.KeyFile != "":
		return fmt.Errorf("key_file %s has no cert_file", t.KeyFile)
	case t.CertFile != "":
		cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return err
		}
		to.Certificates = []tls.Certificate{cert}
	}
	if t.CAFile != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(t.CAFile)
		if err != nil {
			return err
		}
		pool.AppendCertsFromPEM(b)
		to.RootCAs = pool
	}
	to.InsecureSkipVerify = t.InsecureSkipVerify
	return nil
}
