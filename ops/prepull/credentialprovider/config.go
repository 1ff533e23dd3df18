// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package credentialprovider

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// configFile is kubelet's CredentialProviderConfig (kubelet.config.k8s.io/v1).
type configFile struct {
	APIVersion string           `yaml:"apiVersion"`
	Kind       string           `yaml:"kind"`
	Providers  []providerConfig `yaml:"providers"`
}

type providerConfig struct {
	Name                 string         `yaml:"name"` // of the program in the directory
	MatchImages          []string       `yaml:"matchImages"`
	DefaultCacheDuration *time.Duration `yaml:"defaultCacheDuration"`
	APIVersion           string         `yaml:"apiVersion"`
	Args                 []string       `yaml:"args"`
	Env                  []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	// TokenAttributes means that the plugin needs a token of the pod's service account. There is no
	// pod here.
	TokenAttributes *yaml.Node `yaml:"tokenAttributes"`
}

// apiVersions returns the versions of the protocol. Requests and responses are the same in all.
func apiVersions() []string {
	const group = "credentialprovider.kubelet.k8s.io/"
	return []string{group + "v1", group + "v1beta1", group + "v1alpha1"}
}

// readConfig reads a file, or all .json, .yaml and .yml files of a directory, as kubelet does.
func readConfig(path string) ([]providerConfig, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	files := []string{path}
	if fi.IsDir() {
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		files = nil
		for _, e := range entries {
			if !e.IsDir() && slices.Contains([]string{".json", ".yaml", ".yml"}, filepath.Ext(e.Name())) {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
		if len(files) == 0 {
			return nil, fmt.Errorf("%s: no .json, .yaml or .yml file in it", path)
		}
	}
	var all []providerConfig
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		var c configFile
		if err := yaml.Unmarshal(b, &c); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		group, _, _ := strings.Cut(c.APIVersion, "/")
		if c.Kind != "CredentialProviderConfig" || group != "kubelet.config.k8s.io" {
			return nil, fmt.Errorf("%s: want apiVersion kubelet.config.k8s.io/v1 and kind CredentialProviderConfig, "+
				"got %q and %q", f, c.APIVersion, c.Kind)
		}
		for _, p := range c.Providers {
			if err := p.validate(); err != nil {
				return nil, fmt.Errorf("%s: provider %q: %w", f, p.Name, err)
			}
			if slices.ContainsFunc(all, func(o providerConfig) bool { return o.Name == p.Name }) {
				return nil, fmt.Errorf("%s: provider %q is there twice", f, p.Name)
			}
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s: no providers in it", path)
	}
	return all, nil
}

func (p *providerConfig) validate() error {
	switch {
	case p.Name == "", p.Name == ".", p.Name == "..", strings.ContainsAny(p.Name, "/ "):
		return errors.New("name: want that of a program in the directory of plugins")
	case !slices.Contains(apiVersions(), p.APIVersion):
		return fmt.Errorf("apiVersion: %q; want one of %s", p.APIVersion, strings.Join(apiVersions(), ", "))
	case len(p.MatchImages) == 0:
		return errors.New("matchImages: want at least one pattern")
	case p.DefaultCacheDuration == nil:
		return errors.New("defaultCacheDuration: missing; 0s means not kept")
	case *p.DefaultCacheDuration < 0:
		return errors.New("defaultCacheDuration: negative")
	}
	for _, m := range p.MatchImages {
		if _, err := url.Parse("https://" + m); err != nil {
			return fmt.Errorf("matchImages: %w", err)
		}
	}
	return nil
}
