// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package keyring

import (
	"net"
	"net/url"
	"path"
	"strings"
)

// Match reports whether an image, such as registry:5000/team/app, is one that a pattern such as
// *.registry.example/team is for. The host matches part by part, with * in each; the port must be
// equal; the path is a prefix of whole characters. It is kubelet's URLsMatch
// (pkg/credentialprovider/keyring.go).
func Match(pattern, image string) bool {
	want, err := url.Parse("https://" + pattern)
	if err != nil {
		return false
	}
	have, err := url.Parse("https://" + image)
	return err == nil && MatchHost(want.Host, have.Host) && strings.HasPrefix(have.Path, want.Path)
}

// MatchHost is [Match] for hosts alone.
func MatchHost(pattern, host string) bool {
	wantName, wantPort := splitPort(pattern)
	name, port := splitPort(host)
	want, have := strings.Split(wantName, "."), strings.Split(name, ".")
	if wantPort != port || len(want) != len(have) {
		return false
	}
	for i := range want {
		if ok, err := path.Match(want[i], have[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

func splitPort(host string) (name, port string) {
	if name, port, err := net.SplitHostPort(host); err == nil {
		return name, port
	}
	return host, ""
}
