// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package runtimeconfig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/sirupsen/logrus"
)

const (
	// defaultFile is containerd's default, which need not exist.
	defaultFile = "/etc/containerd/config.toml"
	// defaultConfigPath is what containerd 2 uses if neither config_path nor mirrors are set
	// (plugins/cri/images). containerd 1.x has no default.
	defaultConfigPath = "/etc/containerd/certs.d:/etc/docker/certs.d"

	// imagesPlugin has the registries since version 3 of the file; criPlugin had them before.
	imagesPlugin, criPlugin = "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri"
)

// registry is what the file says of registries: containerd's internal/cri/config.Registry, and what
// 1.x has in addition.
type registry struct {
	ConfigPath string                  `toml:"config_path"`
	Mirrors    map[string]mirror       `toml:"mirrors"`
	Configs    map[string]hostSettings `toml:"configs"`
	Auths      map[string]auth         `toml:"auths"`
	Headers    map[string][]string     `toml:"headers"`
}

type mirror struct {
	Endpoints []string `toml:"endpoint"`
}

type hostSettings struct {
	Auth *auth `toml:"auth"`
	// TLS counts with containerd 1.x only.
	TLS *tlsSettings `toml:"tls"`
}

type auth struct {
	Username      string `toml:"username"`
	Password      string `toml:"password"`
	Auth          string `toml:"auth"`
	IdentityToken string `toml:"identitytoken"`
}

type tlsSettings struct {
	InsecureSkipVerify bool   `toml:"insecure_skip_verify"`
	CAFile             string `toml:"ca_file"`
	CertFile           string `toml:"cert_file"`
	KeyFile            string `toml:"key_file"`
}

// configFile returns the file that containerd reads, and whether its command line names the file:
// the default one may be missing.
func configFile(args []string) (file string, told bool) {
	for i, arg := range args {
		name, value, equals := strings.Cut(strings.TrimPrefix(arg, "-"), "=")
		if !strings.HasPrefix(arg, "-") || !slices.Contains([]string{"-config", "config", "c", "-c"}, name) {
			continue
		}
		if !equals {
			if i+1 == len(args) {
				continue
			}
			value = args[i+1]
		}
		file, told = value, true
	}
	if !told {
		file = defaultFile
	}
	return file, told
}

// readFile reads the configuration with containerd's own code: imports, the merging of files, and
// all versions up to that of the module. cwd is the directory that a relative path begins at.
func readFile(ctx context.Context, file, cwd string, told bool) (*registry, error) {
	if !filepath.IsAbs(file) {
		file = filepath.Join(cwd, file)
	}
	r := &registry{}
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) && !told {
		return r, nil
	}
	quiet := logrus.New()
	quiet.SetOutput(io.Discard) // containerd itself has logged it
	ctx = log.WithLogger(ctx, logrus.NewEntry(quiet))
	out := &srvconfig.Config{Version: version.ConfigVersion, Plugins: map[string]any{}}
	if err := srvconfig.LoadConfigWithPlugins(ctx, file, migrations, out); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	images := struct {
		Registry *registry `toml:"registry"`
	}{r}
	if _, err := out.Decode(ctx, imagesPlugin, &images); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", file, imagesPlugin, err)
	}
	// As containerd does it (ValidateImageConfig).
	for endpoint, a := range r.Auths {
		u, err := url.Parse(endpoint)
		if err != nil {
			return nil, fmt.Errorf("%s: registry.auths has an endpoint that is no URL", file)
		}
		if u.Scheme != "" {
			endpoint = u.Host
		}
		if r.Configs == nil {
			r.Configs = map[string]hostSettings{}
		}
		c := r.Configs[endpoint]
		c.Auth = &a
		r.Configs[endpoint] = c
	}
	return r, nil
}

// migrations moves the registries from where they are in versions before 3, as containerd's plugin
// does (plugins/cri/images).
func migrations() iter.Seq[plugin.Registration] {
	return slices.Values([]plugin.Registration{{
		Type: "io.containerd.cri.v1", ID: "images",
		ConfigMigration: func(_ context.Context, _ int, plugins map[string]any) error {
			old, _ := plugins[criPlugin].(map[string]any)
			registries, ok := old["registry"]
			if !ok {
				return nil
			}
			images, _ := plugins[imagesPlugin].(map[string]any)
			if images == nil {
				images = map[string]any{}
			}
			images["registry"] = registries
			plugins[imagesPlugin] = images
			return nil
		},
	}})
}

// major is the first number of a version such as v1.7.35 or 2.4.2; 0 for none.
func major(version string) int {
	first, _, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	n, err := strconv.Atoi(first)
	if err != nil {
		return 0
	}
	return n
}
