// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"slices"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func credentials(matches ...string) []*opsv1.RegistryCredential {
	var out []*opsv1.RegistryCredential
	for _, m := range matches {
		out = append(out, &opsv1.RegistryCredential{Match: m, Username: m})
	}
	return out
}

// TestMatching has what kubelet's keyring does (pkg/credentialprovider/keyring_test.go), and its corners.
func TestMatching(t *testing.T) {
	for _, tt := range []struct {
		name    string
		image   string
		entries []string
		want    []string // in order
	}{
		{"host", "quay.io/a/b", []string{"quay.io", "gcr.io"}, []string{"quay.io"}},
		{"scheme", "quay.io/a/b", []string{"https://quay.io", "http://quay.io"}, []string{"https://quay.io", "http://quay.io"}},
		{"path first, then host", "quay.io/coreos/etcd", []string{"quay.io", "quay.io/coreos", "quay.io/co"}, []string{"quay.io/coreos", "quay.io/co", "quay.io"}},
		{"another path", "quay.io/coreos/etcd", []string{"quay.io/other"}, nil},
		{"path is a prefix of characters", "gcr.io/foobar", []string{"gcr.io/foo"}, []string{"gcr.io/foo"}},
		{"no prefix", "gcr.io/foo", []string{"gcr.io/foo/"}, nil},
		{"API version", "quay.io/a/b", []string{"https://quay.io/v1/", "https://quay.io/v2/", "https://quay.io/v2/a"}, []string{"https://quay.io/v2/a", "https://quay.io/v1/", "https://quay.io/v2/"}},
		{"API version without an end is a path", "quay.io/a/b", []string{"https://quay.io/v1"}, nil},
		{"trailing slash", "quay.io/a/b", []string{"quay.io/"}, []string{"quay.io/"}},
		{"wildcard", "a.kubernetes.io/x", []string{"*.kubernetes.io", "*.io", "k8s.*.io", "*.*.io"}, []string{"*.kubernetes.io", "*.*.io"}},
		{"part of a name", "prefixed.kubernetes.io/x", []string{"prefix*.kubernetes.io", "*fixed.kubernetes.io", "fixed.kubernetes.io"}, []string{"prefix*.kubernetes.io", "*fixed.kubernetes.io"}},
		{"wildcard across dots", "a.b.kubernetes.io/x", []string{"*.kubernetes.io"}, nil},
		{"wildcard with path", "a.kubernetes.io/x/y", []string{"*.kubernetes.io/x", "*.kubernetes.io/z"}, []string{"*.kubernetes.io/x"}},
		{"wildcard in a path is a character", "a.io/x/y", []string{"a.io/*"}, nil},
		{"port", "registry:5000/a", []string{"registry", "registry:5000", "registry:5001"}, []string{"registry:5000"}},
		{"wildcard and port", "a.registry.io:5000/a", []string{"*.registry.io:5000", "*.registry.io"}, []string{"*.registry.io:5000"}},
		{"port wanted, none there", "registry.io/a", []string{"registry.io:443"}, nil},
		{"address", "10.0.0.1:5000/a", []string{"10.0.0.1:5000", "*.0.0.1:5000"}, []string{"10.0.0.1:5000", "*.0.0.1:5000"}},
		{"Docker Hub by its old name", "nginx", []string{"https://index.docker.io/v1/"}, []string{"https://index.docker.io/v1/"}},
		{"Docker Hub by its name", "nginx", []string{"docker.io", "https://index.docker.io/v1/"}, []string{"docker.io"}},
		{"Docker Hub by path", "team/app", []string{"docker.io/team", "docker.io/library", "index.docker.io/team"}, []string{"docker.io/team"}},
		{"Docker Hub's old name is for nothing else", "quay.io/a/b", []string{"https://index.docker.io/v1/"}, nil},
		{"equal keys stay in order", "quay.io/a", []string{"quay.io", "https://quay.io", "quay.io/"}, []string{"quay.io", "https://quay.io", "quay.io/"}},
		{"broken pattern", "quay.io/a", []string{"[.io", "quay.io"}, []string{"quay.io"}},
		{"not a URL", "quay.io/a", []string{"https://%zz", "", "://", "quay.io"}, []string{"quay.io"}},
		{"tag and digest do not count", "quay.io/a:1@sha256:0000000000000000000000000000000000000000000000000000000000000000", []string{"quay.io/a"}, []string{"quay.io/a"}},
		{"upper case", "quay.io/a", []string{"Quay.io"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			named, err := normalize(tt.image)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range matching(credentials(tt.entries...), named) {
				got = append(got, c.GetMatch())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestAuthConfig(t *testing.T) {
	if authConfig(nil) != nil {
		t.Error("no credential is one")
	}
	basic := authConfig(&opsv1.RegistryCredential{Username: "u", Password: "p"})
	if basic.GetUsername() != "u" || basic.GetPassword() != "p" {
		t.Errorf("%v", basic)
	}
	// containerd would take the name, and leave the token.
	token := authConfig(&opsv1.RegistryCredential{Username: "00000000-0000-0000-0000-000000000000", IdentityToken: "t"})
	if token.GetUsername() != "" || token.GetIdentityToken() != "t" {
		t.Errorf("%v", token)
	}
}

func FuzzMatching(f *testing.F) {
	f.Add("quay.io/a", "https://quay.io/v1/")
	f.Add("nginx", "*.io:5000/[")
	f.Fuzz(func(_ *testing.T, image, match string) {
		named, err := normalize(image)
		if err != nil {
			return
		}
		matching(credentials(match), named)
	})
}

func TestNormalize(t *testing.T) {
	const sum = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	for image, want := range map[string]string{
		"nginx":                     "docker.io/library/nginx:latest",
		"nginx:1":                   "docker.io/library/nginx:1",
		"team/app":                  "docker.io/team/app:latest",
		"localhost/app":             "localhost/app:latest",
		"registry:5000/app":         "registry:5000/app:latest",
		"registry:5000/app:1":       "registry:5000/app:1",
		"registry.io/app@" + sum:    "registry.io/app@" + sum,
		"registry.io/app:1@" + sum:  "registry.io/app@" + sum,
		"index.docker.io/nginx":     "docker.io/library/nginx:latest",
		"[::1]:5000/app":            "[::1]:5000/app:latest",
		"registry.io/a/b/c/d/e/f:1": "registry.io/a/b/c/d/e/f:1",
	} {
		named, err := normalize(image)
		if err != nil || named.String() != want {
			t.Errorf("%s: %v, %v", image, named, err)
		}
	}
}
