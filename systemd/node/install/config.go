// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/yamledit"
	"github.com/cri-proxy/cri-proxy/systemd"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// configure sets i.Config to what the file is to hold, and returns the text of the file.
func (i *installer) configure(k *kubelet.Kubelet) ([]byte, error) {
	shipped, err := systemd.File("config.yaml")
	if err != nil {
		return nil, err
	}
	text, err := readConfig(config.DefaultFile)
	if err != nil {
		return nil, err
	}
	untouched := text == nil || bytes.Equal(text, shipped)
	if text == nil {
		text = shipped
	}
	have := config.Default()
	if err := config.Parse(config.DefaultFile, text, have); err != nil {
		return nil, &config.InvalidError{Err: err}
	}
	i.before = have
	// The flags have been written into i.Config. They override the file.
	if err := config.Parse(config.DefaultFile, text, i.Config); err != nil {
		return nil, &config.InvalidError{Err: err}
	}
	if untouched && k != nil {
		if err := i.learn(k); err != nil {
			return nil, err
		}
	}
	if err := i.Given.Apply(); err != nil {
		return nil, err
	}
	if o := &i.Config.Ops; k != nil && o.Address != "" && o.CertFile == "" && o.Enrol.Kubeconfig == "" {
		o.Enrol.Kubeconfig = k.Kubeconfig() // the controller gives the certificate
	}
	if text, err = merge(text, have, i.Config); err != nil {
		return nil, err
	}
	check := *i.Config
	if err := errors.Join(check.Complete(), check.Validate()); err != nil {
		return nil, &config.InvalidError{Err: fmt.Errorf("configuration: %w", err)}
	}
	return text, nil
}

// readConfig returns the content of the file, nil if there is none. A symlink to nothing is an
// error: it is a mistake, or leads to a file system that is not mounted yet.
func readConfig(path string) ([]byte, error) {
	text, err := plan.Read(path)
	if to, lerr := os.Readlink(path); err == nil && text == nil && lerr == nil {
		return nil, fmt.Errorf("%s is a symlink to %s, which is not there: put a file there, or remove the symlink",
			path, to)
	}
	return text, err
}

// learn takes settings from kubelet that both must have.
func (i *installer) learn(k *kubelet.Kubelet) error {
	c := i.Config
	endpoint, err := k.Endpoint()
	if err != nil {
		return err
	}
	path, err := config.SocketPath(endpoint)
	if err != nil {
		return fmt.Errorf("kubelet's runtime endpoint: %w", err)
	}
	def, err := config.SocketPath(c.RuntimeEndpoint)
	if err != nil {
		return &config.InvalidError{Err: err}
	}
	known := path == c.Listen.Path || path == bypass.KubeletSocket(c) || real(path) == real(def)
	if !known && !i.Given.Has("runtime-endpoint") {
		c.RuntimeEndpoint = "unix://" + path
	}
	if f, d := k.CredentialProviders(); f != "" && c.Images.CredentialProviderConfig == "" {
		c.Images.CredentialProviderConfig, c.Images.CredentialProviderBinDir = f, d
	}
	if root := k.RootDir(); root != filepath.Dir(filepath.Dir(filepath.Dir(c.Kubelet.PodsSocket))) {
		c.Kubelet.PodsSocket = filepath.Join(root, "pods-api", "pods-api.sock")
	}
	if name, err := k.NodeName(); err == nil && c.NodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		if name != strings.ToLower(host) {
			c.NodeName = name
		}
	}
	return nil
}

// real follows symlinks, such as /var/run.
func real(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return path
}

// merge puts into the text what differs between the two configurations; the rest of it stays.
func merge(text []byte, have, want *config.Config) ([]byte, error) {
	values := func(c *config.Config) (map[string]any, error) {
		b, err := c.YAML()
		if err != nil {
			return nil, err
		}
		m := map[string]any{}
		return m, yaml.Unmarshal(b, &m)
	}
	h, err := values(have)
	if err != nil {
		return nil, err
	}
	w, err := values(want)
	if err != nil {
		return nil, err
	}
	// The file may have a new name of a key, which stays.
	has := map[string]any{}
	if err := yaml.Unmarshal(text, &has); err != nil {
		return nil, err
	}
	for key, renamed := range config.RenamedKeys() {
		if _, ok := has[renamed]; ok {
			h[renamed], w[renamed] = h[key], w[key]
			delete(h, key)
			delete(w, key)
		}
	}
	return mergeMap(text, nil, h, w)
}

func mergeMap(text []byte, path []string, have, want map[string]any) ([]byte, error) {
	keys := make([]string, 0, len(want))
	for key := range want {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var err error
	for _, key := range keys {
		at := append(slices.Clip(path), key)
		if sub, ok := want[key].(map[string]any); ok {
			below, _ := have[key].(map[string]any)
			if text, err = mergeMap(text, at, below, sub); err != nil {
				return nil, err
			}
			continue
		}
		value := want[key]
		if list, ok := value.([]any); ok {
			names := make([]string, 0, len(list))
			for _, v := range list {
				names = append(names, fmt.Sprint(v))
			}
			value = names
		}
		if fmt.Sprint(have[key]) == fmt.Sprint(want[key]) {
			continue
		}
		if text, err = yamledit.Set(text, value, at...); err != nil {
			return nil, fmt.Errorf("%s: %w", config.DefaultFile, err)
		}
	}
	return text, nil
}

// configFile is the configuration as it is to be. The file may be the administrator's: a symlink
// stays one, and the mode stays.
func configFile(path string, text []byte) file {
	f := file{real(path), text, 0o644}
	if fi, err := os.Stat(f.path); err == nil {
		f.mode = fi.Mode().Perm()
	}
	return f
}
