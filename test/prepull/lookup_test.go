// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestRequestsAtTheRegistry counts what a registry is asked for an image: registries count, too,
// and end what is beyond.
func TestRequestsAtTheRegistry(t *testing.T) { requestsAtTheRegistry(t) }

func requestsAtTheRegistry(t *testing.T) {
	const limit = 100 * mib
	f := newFront(t, "counts.test")
	// pull has the runtime pull alone, or the proxy with and without a limit; each an image of its
	// own.
	pull := map[string]func(t *testing.T, image string, policy opsv1.PullPolicy){
		"the runtime": func(t *testing.T, image string, _ opsv1.PullPolicy) {
			_, err := bed.direct.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
			must(t, err)
		},
		"without limit": func(t *testing.T, image string, policy opsv1.PullPolicy) {
			succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Policy: policy}))
		},
		"with a limit": func(t *testing.T, image string, policy opsv1.PullPolicy) {
			succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Policy: policy, BytesPerSecond: limit}))
		},
	}
	for _, index := range []bool{false, true} {
		counts := map[string]map[string]int{}
		again := map[string]map[string]int{}
		for name, do := range pull {
			p := push(t, fmt.Sprintf("counts-%d:1", number.Add(1)), 3, 1)
			if index {
				putIndex(t, p)
			}
			image := f.image(p.name)
			t.Cleanup(func() { remove(t, image) })
			counts[name] = f.requestsOf(func() { do(t, image, opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT) })
			// The image is there.
			again[name] = f.requestsOf(func() { do(t, image, opsv1.PullPolicy_PULL_POLICY_ALWAYS) })
		}
		t.Logf("index %v: %v, and when it is there %v", index, counts, again)
		for _, seen := range []map[string]map[string]int{counts, again} {
			want := seen["the runtime"]
			if !maps.Equal(seen["without limit"], want) {
				t.Errorf("index %v: the registry is asked %v, by the runtime alone %v", index, seen["without limit"],
					want)
			}
			want = maps.Clone(want)
			want["HEAD manifests"]++
			if !maps.Equal(seen["with a limit"], want) {
				t.Errorf("index %v: with a limit the registry is asked %v, want %v", index, seen["with a limit"], want)
			}
		}
	}
}

// TestUnpackedLayersAreThere has a runtime that throws layers away once it has unpacked them, as on
// managed nodes. A new version of an image that is there brings its new layer, and nothing else is
// fetched or counted.
func TestUnpackedLayersAreThere(t *testing.T) {
	discardUnpacked(t)
	unpackedLayersAreThere(t)
}

// discardUnpacked has containerd throw layers away, until the test ends.
func discardUnpacked(t *testing.T) {
	t.Helper()
	before, err := os.ReadFile(bed.ContainerdConfigFile())
	must(t, err)
	config := string(before)
	const v3, v2, setting = "[plugins.\"io.containerd.cri.v1.images\"]\n",
		"[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n", "  discard_unpacked_layers = true\n"
	if strings.Contains(config, v3) {
		config = strings.Replace(config, v3, v3+setting, 1)
	} else {
		config += v2 + setting
	}
	with := func(ctx context.Context, config string) {
		must(t, os.WriteFile(bed.ContainerdConfigFile(), []byte(config), 0o644)) //nolint:gosec // no secret
		must(t, bed.RestartContainerd(ctx))
		must(t, bed.WaitProxyReady(ctx))
	}
	with(t.Context(), config)
	t.Cleanup(func() { with(context.WithoutCancel(t.Context()), string(before)) })
}

func unpackedLayersAreThere(t *testing.T) {
	const small = mib
	for _, limit := range []int64{0, 20 * mib} {
		t.Run(fmt.Sprintf("limit %d", limit), func(t *testing.T) {
			f := newFront(t, "discards.test")
			old := push(t, fmt.Sprintf("discards-%d:1", number.Add(1)), 4, 8)
			next := pushOnTop(t, old, "2")
			succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(old.name), BytesPerSecond: limit}))
			gone(t, old)
			before := f.bytes.Load()
			op := succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(next.name), BytesPerSecond: limit}))
			fetched := f.bytes.Load() - before
			t.Logf("version 2 of %d MiB took %.2f MiB; the operation says %d", next.size/mib, float64(fetched)/mib,
				op.GetBytesFetched())
			if fetched < small || fetched > 2*small {
				t.Errorf("the registry sent %d bytes for a layer of %d", fetched, small)
			}
			if n := op.GetBytesFetched(); n < small || n > 2*small {
				t.Errorf("%d bytes are said to be fetched", n)
			}
			if op.GetBytesTotal() != next.size || op.GetBytesDone() != next.size {
				t.Errorf("%v", op)
			}
			if l := ourLeases(t); len(l) != 0 {
				t.Errorf("leases left: %v", l)
			}
		})
	}
	t.Run("disk", func(t *testing.T) {
		f := newFront(t, "discards-disk.test")
		old := push(t, fmt.Sprintf("discards-%d:1", number.Add(1)), 4, 8)
		next := pushOnTop(t, old, "2")
		succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(old.name)}))
		gone(t, old)
		guardDisk(t, "0.001")
		op := fails(t, begin(t, &opsv1.PullRequest{Image: f.image(next.name), MaxAttempts: 1}), "DiskPressure")
		if !strings.Contains(op.GetMessage(), "needs about 3.5 MiB more") {
			t.Errorf("the whole image is counted: %v", op)
		}
		if l := ourLeases(t); len(l) != 0 {
			t.Errorf("leases left: %v", l)
		}
	})
}

// TestOnlyTheRuntimeReachesIt has a registry that answers the runtime and nobody else.
func TestOnlyTheRuntimeReachesIt(t *testing.T) {
	f := newFront(t, "elsewhere.test")
	asked := 0
	f.mu.Lock()
	f.deaf = func(r *http.Request) bool {
		if holds(bed.Pid("containerd"), r.RemoteAddr) {
			return false
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		asked++
		return true
	}
	f.mu.Unlock()
	for i, q := range []pushed{push(t, "elsewhere:1", 2, 1), push(t, "elsewhere:2", 2, 1)} {
		began := time.Now()
		uid := begin(t, &opsv1.PullRequest{Image: f.image(q.name), BytesPerSecond: 100 * mib, MaxAttempts: 1,
			AttemptTimeout: durationpb.New(30 * time.Second)})
		op := succeeds(t, uid)
		f.mu.Lock()
		n := asked
		f.mu.Unlock()
		t.Logf("%d: %s, asked %d times: %s", i, time.Since(began).Round(time.Millisecond), n, op.GetMessage())
		if n != 1 {
			t.Errorf("it was asked %d times", n)
		}
		if !strings.HasPrefix(op.GetMessage(),
			"pulled without the speed limit of 100.0 MiB/s: registry elsewhere.test has not told") {
			t.Errorf("%v", op)
		}
		if op.GetBytesTotal() != q.size || op.GetBytesFetched() != q.size {
			t.Errorf("what the runtime fetched is not seen: %v", op)
		}
	}
}

// TestTooLargeForTheDisk has an image whose manifest says that it is larger than the disk. The
// runtime has begun to fetch it by then: it is stopped, and nothing of it stays.
func TestTooLargeForTheDisk(t *testing.T) {
	guardDisk(t, "99.9")
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString(rand.Text()),
		Size: 1 << 45}
	config, err := json.Marshal(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}}})
	must(t, err)
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Layers: []ocispec.Descriptor{layer},
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config),
			Size: int64(len(config))},
	})
	must(t, err)
	var sent atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(manifest).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
			_, _ = w.Write(manifest)
		case strings.HasSuffix(r.URL.Path, digest.FromBytes(config).String()):
			_, _ = w.Write(config)
		default:
			w.Header().Set("Content-Length", fmt.Sprint(layer.Size))
			for tick := time.NewTicker(time.Millisecond); ; <-tick.C { // 64 MiB a second
				n, err := w.Write(make([]byte, 64<<10))
				sent.Add(int64(n))
				if err != nil {
					tick.Stop()
					return
				}
			}
		}
	}))
	t.Cleanup(server.Close)
	must(t, bed.MapRegistry("giant.test", server.URL))
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), "giant.test")) })
	op := fails(t, begin(t, &opsv1.PullRequest{Image: "giant.test/giant:1", MaxAttempts: 1}), "DiskPressure")
	t.Logf("%.1f MiB were sent", float64(sent.Load())/mib)
	if !strings.Contains(op.GetMessage(), "112.0 TiB more") || op.GetBytesTotal() != layer.Size {
		t.Errorf("%v", op)
	}
	if l := ourLeases(t); len(l) != 0 {
		t.Errorf("leases left: %v", l)
	}
	eventually(t, func() error { // the runtime lets go of what it was writing
		collect(t)
		left, err := filepath.Glob(filepath.Join(bed.NodeDir, "containerd", "io.containerd.content.v1.content",
			"ingest", "*"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("left: %v", left)
		}
		return err
	})
}

// putIndex puts an index where the image's manifest is, with another platform beside this one.
func putIndex(t testing.TB, p pushed) {
	t.Helper()
	repository, tag, _ := strings.Cut(p.name, ":")
	raw := get(t, repository, "manifests/"+p.digest.String(), nil)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{
			{MediaType: ocispec.MediaTypeImageManifest, Digest: p.digest, Size: int64(len(raw)),
				Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}},
		}}
	raw, err := json.Marshal(index)
	must(t, err)
	send(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", bed.Registry, repository, tag),
		index.MediaType, raw)
}

// pushOnTop pushes the image with one more layer, of a MiB.
func pushOnTop(t testing.TB, p pushed, tag string) pushed {
	t.Helper()
	repository, _, _ := strings.Cut(p.name, ":")
	top := push(t, repository+":top", 1, 1)
	var below, above ocispec.Manifest
	var config, upper ocispec.Image
	get(t, repository, "manifests/"+p.digest.String(), &below)
	get(t, repository, "manifests/"+top.digest.String(), &above)
	get(t, repository, "blobs/"+below.Config.Digest.String(), &config)
	get(t, repository, "blobs/"+above.Config.Digest.String(), &upper)
	below.Layers = append(below.Layers, above.Layers...)
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, upper.RootFS.DiffIDs...)
	raw, err := json.Marshal(config)
	must(t, err)
	below.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(raw),
		Size: int64(len(raw))}
	putBlob(t, repository, below.Config.Digest, raw)
	raw, err = json.Marshal(below)
	must(t, err)
	send(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", bed.Registry, repository, tag),
		below.MediaType, raw)
	return pushed{name: repository + ":" + tag, digest: digest.FromBytes(raw), size: p.size + top.size}
}

// get reads a manifest or a config from the bed's registry, into into if that is not nil.
func get(t testing.TB, repository, path string, into any) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		fmt.Sprintf("http://%s/v2/%s/%s", bed.Registry, repository, path), nil)
	must(t, err)
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s\n%s", path, resp.Status, raw)
	}
	if into != nil {
		must(t, json.Unmarshal(raw, into))
	}
	return raw
}

// gone has the runtime throw an image's layers away, as it does from time to time.
func gone(t testing.TB, p pushed) {
	t.Helper()
	repository, _, _ := strings.Cut(p.name, ":")
	var manifest ocispec.Manifest
	get(t, repository, "manifests/"+p.digest.String(), &manifest)
	blobs := filepath.Join(bed.NodeDir, "containerd", "io.containerd.content.v1.content", "blobs", "sha256")
	collect(t)
	for _, l := range manifest.Layers {
		if _, err := os.Stat(filepath.Join(blobs, l.Digest.Encoded())); err == nil {
			t.Fatalf("layer %s is still there: the test shows nothing", l.Digest)
		}
	}
}

// remove takes an image from the node, and what only it has.
func remove(t testing.TB, image string) {
	t.Helper()
	_, err := bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
		&runtimeapi.RemoveImageRequest{Image: spec(image)})
	must(t, err)
}

// collect has containerd delete what nothing refers to.
func collect(t testing.TB) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	lease, err := bed.leases.Create(ctx, &leasesapi.CreateRequest{ID: fmt.Sprintf("collect-%d", number.Add(1))})
	must(t, err)
	_, err = bed.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: lease.GetLease().GetID(), Sync: true})
	must(t, err)
}

// holds reports whether the process has the other end of a connection that comes from addr.
func holds(pid int, addr string) bool {
	_, text, _ := strings.Cut(addr, ":")
	port, err := strconv.Atoi(text)
	table, rerr := os.ReadFile("/proc/net/tcp")
	if err != nil || rerr != nil {
		return false
	}
	sockets := map[string]bool{}
	for line := range strings.Lines(string(table)) {
		// sl, local address, remote address, st, queues, timer, retransmissions, uid, timeout,
		// inode
		if fields := strings.Fields(line); len(fields) > 9 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
			sockets["socket:["+fields[9]+"]"] = true
		}
	}
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(files, func(file string) bool {
		target, err := os.Readlink(file)
		return err == nil && sockets[target]
	})
}
