// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package keyring

import (
	"net/url"
	"slices"
	"strings"

	"github.com/distribution/reference"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// defaultRegistry is the key of docker.io in docker config files.
const defaultRegistry = "index.docker.io"

// Matching returns the credentials for the image, the most specific first, as kubelet's keyring
// finds and orders them (pkg/credentialprovider/keyring.go, Add and Lookup).
func Matching(all []*opsv1.RegistryCredential, named reference.Named) []*opsv1.RegistryCredential {
	type entry struct {
		key        string
		credential *opsv1.RegistryCredential
	}
	host, repository := reference.Domain(named), strings.TrimSuffix(reference.Path(named), "/")
	var matched, fallback []entry
	for _, c := range all {
		wantHost, wantPath, err := parseMatch(c.GetMatch())
		switch {
		case err != nil:
		case MatchHost(wantHost, host) && strings.HasPrefix("/"+repository, wantPath):
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

// parseMatch returns host and path of an entry's key, without what docker config files carry along:
// a scheme, and an API version in front of the path.
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

// ForImage is [Matching] for an image as a pod names it; none for what is no reference, which
// cannot be pulled either.
func ForImage(all []*opsv1.RegistryCredential, image string) []*opsv1.RegistryCredential {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return nil
	}
	return Matching(all, named)
}
