// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"net"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// defaultRegistry is the key of docker.io in docker config files.
const defaultRegistry = "index.docker.io"

// matching returns the credentials for the image, the most specific first, as kubelet's keyring finds and orders
// them (pkg/credentialprovider/keyring.go, Add and Lookup).
func matching(all []*opsv1.RegistryCredential, named reference.Named) []*opsv1.RegistryCredential {
	type entry struct {
		key        string
		credential *opsv1.RegistryCredential
	}
	host, repository := registryOf(named)
	var matched, fallback []entry
	for _, c := range all {
		wantHost, wantPath, err := parseMatch(c.GetMatch())
		switch {
		case err != nil:
		case matches(wantHost, wantPath, host, "/"+repository):
			matched = append(matched, entry{wantHost + wantPath, c})
		case host == "docker.io" && wantHost == defaultRegistry && wantPath == "":
			fallback = append(fallback, entry{wantHost, c})
		}
	}
	if len(matched) == 0 {
		matched = fallback
	}
	slices.SortStableFunc(matched, func(a, b entry) int { return strings.Compare(b.key, a.key) })
	var out []*opsv1.RegistryCredential
	for _, e := range matched {
		out = append(out, e.credential)
	}
	return out
}

// parseMatch returns host and path of an entry's key, without what docker config files carry along: a scheme, and an
// API version in front of the path.
func parseMatch(match string) (host, path string, err error) {
	if !strings.HasPrefix(match, "https://") && !strings.HasPrefix(match, "http://") {
		match = "https://" + match
	}
	u, err := url.Parse(match)
	if err != nil {
		return "", "", err
	}
	path = u.Path
	if strings.HasPrefix(path, "/v2/") || strings.HasPrefix(path, "/v1/") {
		path = path[3:]
	}
	if path == "/" {
		path = ""
	}
	return u.Host, path, nil
}

// matches reports whether an entry is for the repository. The host matches part by part, with * in each;
// the port must be equal; the path is a prefix of whole characters, as kubelet takes it.
func matches(wantHost, wantPath, host, repository string) bool {
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

// authConfig is the credential as CRI takes it; nil for none. containerd's CRI plugin prefers a name to an identity token
// (ParseAuth), and docker config files have both where only the token is good.
func authConfig(c *opsv1.RegistryCredential) *runtimeapi.AuthConfig {
	switch {
	case c == nil:
		return nil
	case c.GetIdentityToken() != "":
		return &runtimeapi.AuthConfig{IdentityToken: c.GetIdentityToken(), RegistryToken: c.GetRegistryToken()}
	default:
		return &runtimeapi.AuthConfig{Username: c.GetUsername(), Password: c.GetPassword(), RegistryToken: c.GetRegistryToken()}
	}
}
