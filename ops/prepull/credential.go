// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"net"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// matching returns the credentials for the image, the most specific first, as kubelet's keyring orders
// them (pkg/credentialprovider/keyring.go).
func matching(all []*opsv1.RegistryCredential, named reference.Named) []*opsv1.RegistryCredential {
	host, repository := registryOf(named)
	var out []*opsv1.RegistryCredential
	for _, c := range all {
		if matches(c.GetMatch(), host, repository) {
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b *opsv1.RegistryCredential) int {
		return strings.Compare(matchKey(b.GetMatch()), matchKey(a.GetMatch()))
	})
	return out
}

// matchKey is the entry's key without what docker config files carry along: a scheme and an API version.
func matchKey(match string) string {
	if _, rest, ok := strings.Cut(match, "://"); ok {
		match = rest
	}
	match = strings.TrimSuffix(match, "/")
	host, rest, _ := strings.Cut(match, "/")
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	if rest == "v1" || rest == "v2" {
		rest = ""
	}
	if rest == "" {
		return host
	}
	return host + "/" + rest
}

// matches reports whether a docker config entry is for the repository. The host matches part by part, with * in each;
// the port must be equal; the path is a prefix of whole characters, as kubelet takes it.
func matches(match, host, repository string) bool {
	wantHost, wantPath, _ := strings.Cut(matchKey(match), "/")
	if wantHost == "" {
		return false
	}
	wantName, wantPort := splitPort(wantHost)
	name, port := splitPort(host)
	if wantPort != port {
		return false
	}
	want, have := strings.Split(wantName, "."), strings.Split(name, ".")
	if len(want) != len(have) {
		return false
	}
	for i := range want {
		if ok, err := path.Match(want[i], have[i]); err != nil || !ok {
			return false
		}
	}
	return strings.HasPrefix(repository, wantPath)
}

func splitPort(host string) (name, port string) {
	if name, port, err := net.SplitHostPort(host); err == nil {
		return name, port
	}
	return host, ""
}

// authConfig is the credential as CRI takes it; nil for none.
func authConfig(c *opsv1.RegistryCredential) *runtimeapi.AuthConfig {
	if c == nil {
		return nil
	}
	return &runtimeapi.AuthConfig{
		Username: c.GetUsername(), Password: c.GetPassword(), IdentityToken: c.GetIdentityToken(), RegistryToken: c.GetRegistryToken(),
	}
}
