// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package keyring

import (
	"slices"
	"testing"

	"github.com/distribution/reference"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func credentials(matches ...string) []*opsv1.RegistryCredential {
	var out []*opsv1.RegistryCredential
	for _, m := range matches {
		out = append(out, &opsv1.RegistryCredential{Match: m, Username: m})
	}
	return out
}

// TestMatching has what kubelet's keyring does (pkg/credentialprovider/keyring_test.go), and its
// corners.
func TestMatching(t *testing.T) {
	for _, tt := range []struct {
		name    string
		image   string
		entries []string
		want    []string // in order
	}{
		{"host", "quay.io/a/b", []string{"quay.io", "gcr.io"}, []string{"quay.io"}},
		{"scheme", "quay.io/a/b", []string{"https://quay.io", "http://quay.io"},
			[]string{"https://quay.io", "http://quay.io"}},
		{"path first, then host", "quay.io/coreos/etcd", []string{"quay.io", "quay.io/coreos", "quay.io/co"},
			[]string{"quay.io/coreos", "quay.io/co", "quay.io"}},
		{"another path", "quay.io/coreos/etcd", []string{"quay.io/other"}, nil},
		{"path is a prefix of characters", "gcr.io/foobar", []string{"gcr.io/foo"}, []string{"gcr.io/foo"}},
		{"no prefix", "gcr.io/foo", []string{"gcr.io/foo/"}, nil},
		{"API version", "quay.io/a/b", []string{"https://quay.io/v1/", "https://quay.io/v2/", "https://quay.io/v2/a"},
			[]string{"https://quay.io/v2/a", "https://quay.io/v1/", "https://quay.io/v2/"}},
		{"API version without an end is a path", "quay.io/a/b", []string{"https://quay.io/v1"}, nil},
		{"trailing slash", "quay.io/a/b", []string{"quay.io/"}, []string{"quay.io/"}},
		{"wildcard", "a.kubernetes.io/x", []string{"*.kubernetes.io", "*.io", "k8s.*.io", "*.*.io"},
			[]string{"*.kubernetes.io", "*.*.io"}},
		{"part of a name", "prefixed.kubernetes.io/x",
			[]string{"prefix*.kubernetes.io", "*fixed.kubernetes.io", "fixed.kubernetes.io"},
			[]string{"prefix*.kubernetes.io", "*fixed.kubernetes.io"}},
		{"wildcard across dots", "a.b.kubernetes.io/x", []string{"*.kubernetes.io"}, nil},
		{"wildcard with path", "a.kubernetes.io/x/y", []string{"*.kubernetes.io/x", "*.kubernetes.io/z"},
			[]string{"*.kubernetes.io/x"}},
		{"wildcard in a path is a character", "a.io/x/y", []string{"a.io/*"}, nil},
		{"port", "registry:5000/a", []string{"registry", "registry:5000", "registry:5001"}, []string{"registry:5000"}},
		{"wildcard and port", "a.registry.io:5000/a", []string{"*.registry.io:5000", "*.registry.io"},
			[]string{"*.registry.io:5000"}},
		{"port wanted, none there", "registry.io/a", []string{"registry.io:443"}, nil},
		{"address", "10.0.0.1:5000/a", []string{"10.0.0.1:5000", "*.0.0.1:5000"},
			[]string{"10.0.0.1:5000", "*.0.0.1:5000"}},
		{"Docker Hub by its old name", "nginx", []string{"https://index.docker.io/v1/"},
			[]string{"https://index.docker.io/v1/"}},
		{"Docker Hub by its name", "nginx", []string{"docker.io", "https://index.docker.io/v1/"},
			[]string{"docker.io"}},
		{"Docker Hub by path", "team/app", []string{"docker.io/team", "docker.io/library", "index.docker.io/team"},
			[]string{"docker.io/team"}},
		{"Docker Hub's old name is for nothing else", "quay.io/a/b", []string{"https://index.docker.io/v1/"}, nil},
		{"equal keys stay in order", "quay.io/a", []string{"quay.io", "https://quay.io", "quay.io/"},
			[]string{"quay.io", "https://quay.io", "quay.io/"}},
		{"broken pattern", "quay.io/a", []string{"[.io", "quay.io"}, []string{"quay.io"}},
		{"not a URL", "quay.io/a", []string{"https://%zz", "", "://", "quay.io"}, []string{"quay.io"}},
		{"tag and digest do not count",
			"quay.io/a:1@sha256:0000000000000000000000000000000000000000000000000000000000000000",
			[]string{"quay.io/a"}, []string{"quay.io/a"}},
		{"upper case", "quay.io/a", []string{"Quay.io"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			named, err := reference.ParseDockerRef(tt.image)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range Matching(credentials(tt.entries...), named) {
				got = append(got, c.GetMatch())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func FuzzMatching(f *testing.F) {
	f.Add("quay.io/a", "https://quay.io/v1/")
	f.Add("nginx", "*.io:5000/[")
	f.Fuzz(func(_ *testing.T, image, match string) {
		named, err := reference.ParseDockerRef(image)
		if err != nil {
			return
		}
		Matching(credentials(match), named)
	})
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, image string
		want           bool
	}{
		{"*.dkr.ecr.*.amazonaws.com", "1234.dkr.ecr.eu-west-1.amazonaws.com/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "1234.dkr.ecr.amazonaws.com/app", false},
		{"registry.io:8080/path", "registry.io:8080/path/app", true},
		{"registry.io:8080/path", "registry.io/path/app", false},
		{"docker.io", "docker.io/library/nginx", true},
		{"[", "a/b", false},
		{"%zz", "a/b", false},
	} {
		if got := Match(tt.pattern, tt.image); got != tt.want {
			t.Errorf("%s for %s: %v", tt.pattern, tt.image, got)
		}
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("*.a.io:1/b", "x.a.io:1/b/c")
	f.Fuzz(func(_ *testing.T, pattern, image string) { Match(pattern, image) })
}
