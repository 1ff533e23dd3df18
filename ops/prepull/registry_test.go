// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// serveManifest serves one manifest, for every name, and returns the directory that leads r.io to it. header goes into hosts.toml.
func serveManifest(t *testing.T, manifest any, header string, answer http.HandlerFunc) string {
	t.Helper()
	raw, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if answer == nil {
		answer = func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(raw).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			_, _ = w.Write(raw)
		}
	}
	s := httptest.NewServer(answer)
	t.Cleanup(s.Close)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "r.io"), 0o755); err != nil {
		t.Fatal(err)
	}
	toml := fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n%s", s.URL, header)
	if err := os.WriteFile(filepath.Join(dir, "r.io", "hosts.toml"), []byte(toml), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// resolved is r.io/a:1 as the registry of the directory has it.
func resolved(t *testing.T, dir string, limit *rate.Limiter) *remote {
	t.Helper()
	r, err := newRemote(t.Context(), hostsFrom(dir), "r.io/a:1", nil, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	if err := r.resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// contentOf is an empty content store.
func contentOf(t *testing.T) content.Store {
	t.Helper()
	s, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestManifestThatLies has registries that send what must not be believed.
func TestManifestThatLies(t *testing.T) {
	good := digest.FromString("layer")
	for name, layers := range map[string][]ocispec.Descriptor{
		"no digest":   {{MediaType: ocispec.MediaTypeImageLayer, Size: 1}},
		"half digest": {{MediaType: ocispec.MediaTypeImageLayer, Digest: "sha256", Size: 1}},
		"negative":    {{MediaType: ocispec.MediaTypeImageLayer, Digest: good, Size: -1}},
		"huge":        {{MediaType: ocispec.MediaTypeImageLayer, Digest: good, Size: 1 << 62}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := serveManifest(t, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: good, Size: 1}, Layers: layers}, "", nil)
			r := resolved(t, dir, nil)
			if m, err := r.manifest(t.Context(), contentOf(t)); err == nil {
				t.Errorf("believed: %v", m)
			}
		})
	}
	t.Run("index with a child without a digest", func(t *testing.T) {
		index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Size: 1}}}
		raw, _ := json.Marshal(index)
		dir := serveManifest(t, nil, "", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(raw).String())
			_, _ = w.Write(raw)
		})
		r := resolved(t, dir, nil)
		if m, err := r.manifest(t.Context(), contentOf(t)); err == nil {
			t.Errorf("believed: %v", m)
		}
	})
	t.Run("something else than promised", func(t *testing.T) {
		dir := serveManifest(t, nil, "", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", good.String())
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "{}")
		})
		r := resolved(t, dir, nil)
		if m, err := r.manifest(t.Context(), contentOf(t)); err == nil {
			t.Errorf("believed: %v", m)
		}
	})
}

// TestLimitCountsOnce has a host with a header of its own, whose client is a copy of one that is limited already.
func TestLimitCountsOnce(t *testing.T) {
	body := bytes.Repeat([]byte("x"), 3<<20)
	dir := serveManifest(t, nil, "  [host.\"%s\".header]\n", nil)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			_, _ = w.Write(body)
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", digest.FromString("{}").String())
		w.Header().Set("Content-Length", "2")
		_, _ = io.WriteString(w, "{}")
	}))
	defer s.Close()
	toml := fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n  [host.%q.header]\n    x-custom = [\"1\"]\n", s.URL, s.URL)
	if err := os.WriteFile(filepath.Join(dir, "r.io", "hosts.toml"), []byte(toml), 0o600); err != nil {
		t.Fatal(err)
	}
	fetch := func(limit *rate.Limiter) time.Duration {
		t.Helper()
		r := resolved(t, dir, limit)
		fetcher, err := r.resolver.Fetcher(t.Context(), r.ref)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		rc, err := fetcher.Fetch(t.Context(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(body), Size: int64(len(body))})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, rc)
		rc.Close()
		if err != nil || n != int64(len(body)) {
			t.Errorf("%d bytes, %v", n, err)
		}
		return time.Since(began)
	}
	// 1 MiB is there at once, 2 MiB take 0.5 s.
	if took := fetch(rate.NewLimiter(4<<20, 1<<20)); took < 450*time.Millisecond {
		t.Errorf("it took %s", took)
	}
	const all = 1 << 30
	limit := rate.NewLimiter(1, all) // there is enough, and next to nothing comes back
	fetch(limit)
	if used := all - limit.Tokens(); used < float64(len(body))-1000 || used > float64(len(body)+len(body)/2) {
		t.Errorf("%.0f bytes are counted for %d", used, len(body))
	}
}

// TestTooManyRequestsIsAskedOnce counts what reaches a registry that wants to be left alone.
func TestTooManyRequestsIsAskedOnce(t *testing.T) {
	var asked atomic.Int64
	dir := serveManifest(t, nil, "", func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		http.Error(w, "no", http.StatusTooManyRequests)
	})
	r, err := newRemote(t.Context(), hostsFrom(dir), "r.io/a:1", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	if f := explain(r.resolve(t.Context()), "r.io"); f.reason != opsv1.PullReasonTooManyRequests || asked.Load() != 1 {
		t.Errorf("%d requests, %v", asked.Load(), f)
	}
}
