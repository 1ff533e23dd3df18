// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"net/url"
	"slices"
	"strings"

	"github.com/distribution/reference"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/credentialprovider"
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
		case credentialprovider.MatchHost(wantHost, host) && strings.HasPrefix("/"+repository, wantPath):
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
