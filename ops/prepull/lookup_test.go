// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// node is a bubble whose runtime has a content store and leases as containerd has them, with a registry that is no more than a function.
type node struct {
	*bubble

	mu     sync.Mutex // guards all following fields
	asked  []string   // what the registry was asked by us
	answer func(req *http.Request) (*http.Response, error)
}

func inContainerd(t *testing.T, o Options, f func(t *testing.T, n *node)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		files, err := local.NewStore(filepath.Join(dir, "content"))
		if err != nil {
			t.Fatal(err)
		}
		log := logrus.New()
		log.SetOutput(io.Discard)
		n := &node{bubble: &bubble{t: t, rt: &fakeRuntime{images: map[string]bool{}}, dir: dir, opts: o}}
		n.opts.StateDir, n.opts.Conn, n.opts.Log, n.opts.Hosts = dir, n.rt, log, n.hosts
		held := &held{resources: map[string]map[leases.Resource]bool{}}
		n.opened = func(p *Puller) {
			p.store.content, p.store.leases = &blobs{Store: files, held: held, created: map[digest.Digest]time.Time{}, refer: map[digest.Digest]bool{}}, held
		}
		n.open()
		synctest.Wait() // what a puller begins with is over, and a test may set up its runtime
		f(t, n)
		n.over()
	})
}

// held is what leases hold.
type held struct {
	mu        sync.Mutex // guards all following fields
	resources map[string]map[leases.Resource]bool
}

var _ leases.Manager = (*held)(nil)

// Create implements [leases.Manager].
func (h *held) Create(_ context.Context, opts ...leases.Opt) (leases.Lease, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var l leases.Lease
	for _, o := range opts {
		if err := o(&l); err != nil {
			return l, err
		}
	}
	if h.resources[l.ID] != nil {
		return l, errdefs.ErrAlreadyExists
	}
	h.resources[l.ID] = map[leases.Resource]bool{}
	return l, nil
}

// Delete implements [leases.Manager].
func (h *held) Delete(_ context.Context, l leases.Lease, _ ...leases.DeleteOpt) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.resources, l.ID)
	return nil
}

// List implements [leases.Manager].
func (h *held) List(context.Context, ...string) ([]leases.Lease, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []leases.Lease
	for id := range h.resources {
		list = append(list, leases.Lease{ID: id})
	}
	return list, nil
}

// AddResource implements [leases.Manager].
func (h *held) AddResource(_ context.Context, l leases.Lease, r leases.Resource) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.resources[l.ID] == nil {
		return errdefs.ErrNotFound
	}
	h.resources[l.ID][r] = true
	return nil
}

// DeleteResource implements [leases.Manager].
func (h *held) DeleteResource(_ context.Context, l leases.Lease, r leases.Resource) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.resources[l.ID], r)
	return nil
}

// ListResources implements [leases.Manager].
func (h *held) ListResources(_ context.Context, l leases.Lease) ([]leases.Resource, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.resources[l.ID] == nil {
		return nil, errdefs.ErrNotFound
	}
	return slices.Collect(maps.Keys(h.resources[l.ID])), nil
}

// blobs is a content store that adds to the lease of a call what is written by it, or found.
type blobs struct {
	content.Store
	held *held

	mu      sync.Mutex // guards all following fields
	created map[digest.Digest]time.Time
	refer   map[digest.Digest]bool // manifests and indexes that are labelled
}

// Writer implements [content.Ingester].
func (b *blobs) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if id, ok := leases.FromContext(ctx); ok {
		if err := b.held.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: o.Desc.Digest.String(), Type: contentResource}); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	if _, ok := b.created[o.Desc.Digest]; !ok {
		b.created[o.Desc.Digest] = time.Now()
	}
	b.mu.Unlock()
	return b.Store.Writer(ctx, opts...)
}

// Info implements [content.InfoProvider]. Files know nothing of the time in a bubble.
func (b *blobs) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	info, err := b.Store.Info(ctx, d)
	b.mu.Lock()
	info.CreatedAt = b.created[d]
	if b.refer[d] {
		info.Labels = map[string]string{gcRef + ".config": "sha256:0"}
	}
	b.mu.Unlock()
	return info, err
}

// hosts is a [Hosts].
func (n *node) hosts(_ context.Context, options config.HostOptions) (docker.RegistryHosts, error) {
	return func(host string) ([]docker.RegistryHost, error) {
		client := &http.Client{Transport: n}
		if err := options.UpdateClient(client); err != nil {
			return nil, err
		}
		return []docker.RegistryHost{{Client: client, Host: host, Scheme: "https", Path: "/v2", Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve}}, nil
	}, nil
}

// RoundTrip implements [http.RoundTripper].
func (n *node) RoundTrip(req *http.Request) (*http.Response, error) {
	n.mu.Lock()
	n.asked = append(n.asked, req.Method+" "+req.URL.Path)
	answer := n.answer
	n.mu.Unlock()
	if answer == nil {
		return nil, errors.New("nobody is asked here")
	}
	return answer(req)
}

// requests returns what the registry was asked since the last time.
func (n *node) requests() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	asked := n.asked
	n.asked = nil
	return asked
}

// bring puts a blob into the content store as the runtime does, under the lease of its call. Manifests and indexes are labelled a moment later.
func (n *node) bring(ctx context.Context, list ...blob) error {
	for _, b := range list {
		if err := content.WriteBlob(ctx, n.store.content, remotes.MakeRefKey(ctx, b.Descriptor), bytes.NewReader(b.raw), b.Descriptor); err != nil {
			return err
		}
		if images.IsManifestType(b.MediaType) || images.IsIndexType(b.MediaType) {
			time.Sleep(5 * time.Millisecond)
			s := n.store.content.(*blobs)
			s.mu.Lock()
			s.refer[b.Digest] = true
			s.mu.Unlock()
		}
	}
	return nil
}

// ours returns the leases.
func (n *node) ours() []string {
	ids, err := n.store.ourLeases(n.t.Context())
	if err != nil {
		n.t.Error(err)
	}
	return ids
}

type blob struct {
	ocispec.Descriptor
	raw []byte
}

func blobOf(mediaType string, raw []byte) blob {
	return blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw}
}

// sample is an image of some layers.
type sample struct {
	manifest, config blob
	layers           []blob
	size             int64
	chain            []digest.Digest
}

func sampleOf(layers ...blob) *sample {
	s := &sample{layers: layers}
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, l.Digest)
		m.Layers = append(m.Layers, l.Descriptor)
		s.size += l.Size
	}
	s.chain = identity.ChainIDs(slices.Clone(c.RootFS.DiffIDs))
	raw, _ := json.Marshal(c)
	s.config = blobOf(ocispec.MediaTypeImageConfig, raw)
	m.Config = s.config.Descriptor
	raw, _ = json.Marshal(m)
	s.manifest = blobOf(m.MediaType, raw)
	return s
}

// layer is one of so many bytes.
func layer(name string, size int) blob {
	return blobOf(ocispec.MediaTypeImageLayer, bytes.Repeat([]byte(name), size)[:size])
}

// serve has the image in the registry.
func (s *sample) serve(req *http.Request) (*http.Response, error) {
	for _, b := range append([]blob{s.manifest, s.config}, s.layers...) {
		tag := b.Digest == s.manifest.Digest && strings.HasSuffix(req.URL.Path, "/manifests/latest")
		if tag || strings.HasSuffix(req.URL.Path, "/"+b.Digest.String()) {
			resp := respond(req, http.StatusOK, b.raw)
			resp.Header.Set("Content-Type", b.MediaType)
			resp.Header.Set("Docker-Content-Digest", b.Digest.String())
			return resp, nil
		}
	}
	return respond(req, http.StatusNotFound, nil), nil
}

func respond(req *http.Request, code int, body []byte) *http.Response {
	return &http.Response{
		StatusCode: code, Status: fmt.Sprintf("%d %s", code, http.StatusText(code)), Header: http.Header{}, Request: req,
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)),
	}
}

// The runtime alone asks the registry; what it has asked for is seen in its content store.
func TestManifestOfTheRuntime(t *testing.T) {
	for _, index := range []bool{false, true} {
		inContainerd(t, Options{}, func(t *testing.T, n *node) {
			image := sampleOf(layer("a", 1000), layer("b", 200), layer("c", 30))
			other, err := n.store.lease(t.Context(), "another")
			if err != nil {
				t.Fatal(err)
			}
			if err := n.bring(other, image.layers[0]); err != nil { // of another image
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
				time.Sleep(10 * time.Second) // a slow registry
				if index {
					amd64 := image.manifest.Descriptor
					amd64.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
					raw, _ := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{amd64}})
					if err := n.bring(ctx, blobOf(ocispec.MediaTypeImageIndex, raw)); err != nil {
						return err
					}
					time.Sleep(time.Second)
				}
				if err := n.bring(ctx, image.manifest, image.config, image.layers[0], image.layers[1]); err != nil {
					return err
				}
				time.Sleep(time.Minute)
				return n.bring(ctx, image.layers[2])
			}
			n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a"})
			time.Sleep(20 * time.Second)
			if op := n.want("a", opsv1.PullPhase_PULL_FETCHING, ""); op.GetBytesDone() != 1200 || op.GetBytesTotal() != 1230 || op.GetBytesFetched() != 200 {
				t.Errorf("index %v, under way: %v", index, op)
			}
			if op := n.end("a"); op.GetPhase() != succeeded || op.GetBytesDone() != 1230 || op.GetBytesFetched() != 230 {
				t.Errorf("index %v: %v", index, op)
			}
			if asked := n.requests(); len(asked) > 0 {
				t.Errorf("the registry is asked %q", asked)
			}
		})
	}
}

// allocated returns how much memory is taken while f runs, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// empties is JSON of so many bytes that would be decoded into more than a hundred for each three.
func empties(before string, size int, after string) []byte {
	return []byte(before + strings.Repeat("{},", size/3) + "{}" + after)
}

// Who may create jobs, or pods, chooses what is in an image.
func TestImagesThatWouldFillTheMemory(t *testing.T) {
	inner := blobOf(ocispec.MediaTypeImageManifest, empties(`{"config":{"digest":"sha256:0"},"layers":[`, 2<<20, `]}`))
	inner.Data = inner.raw
	index, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{inner.Descriptor}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]blob{
		"layer":             blobOf(ocispec.MediaTypeImageLayer, empties(`{"layers":[`, 8<<20-20, `]}`)),
		"large manifest":    blobOf(ocispec.MediaTypeImageManifest, empties(`{"config":{"digest":"sha256:0"},"layers":[`, 8<<20-100, `]}`)),
		"manifest":          blobOf(ocispec.MediaTypeImageManifest, empties(`{"config":{"digest":"sha256:0"},"layers":[`, 4<<20-100, `]}`)),
		"index":             blobOf(ocispec.MediaTypeImageIndex, empties(`{"manifests":[`, 4<<20-100, `]}`)),
		"manifest in index": blobOf(ocispec.MediaTypeImageIndex, index),
	} {
		t.Run(name, func(t *testing.T) {
			inContainerd(t, Options{}, func(t *testing.T, n *node) {
				brought := make(chan bool)
				n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
					err := n.bring(ctx, b)
					close(brought)
					time.Sleep(time.Second)
					return err
				}
				n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a"})
				<-brought
				got := allocated(func() {
					if op := n.end("a"); op.GetPhase() != succeeded || op.GetBytesTotal() != 0 {
						t.Errorf("%v", op)
					}
				})
				if got > 64<<20 {
					t.Errorf("%d MiB of memory", got>>20)
				}
			})
		})
	}
	t.Run("look-up", func(t *testing.T) {
		inContainerd(t, Options{}, func(t *testing.T, n *node) {
			image := sampleOf(layer("a", 100))
			image.manifest = blobOf(ocispec.MediaTypeImageManifest, empties(`{"config":{"digest":"sha256:0"},"layers":[`, 4<<20-100, `]}`))
			n.answer = image.serve
			got := allocated(func() {
				n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", BytesPerSecond: 1 << 20})
				if op := n.end("a"); op.GetPhase() != succeeded || !strings.Contains(op.GetMessage(), "pulled without the speed limit") {
					t.Errorf("%v", op)
				}
			})
			if got > 64<<20 {
				t.Errorf("%d MiB of memory", got>>20)
			}
		})
	})
}

// A tag that moves between attempts, and back.
func TestManifestOfThisAttempt(t *testing.T) {
	inContainerd(t, Options{}, func(t *testing.T, n *node) {
		images := []*sample{sampleOf(layer("a", 100)), sampleOf(layer("b", 20))}
		attempt := 0
		n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
			image := images[attempt%2]
			attempt++
			return errors.Join(n.bring(ctx, image.manifest, image.config, image.layers[0]), broken())
		}
		var totals []int64
		n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", MaxAttempts: 3})
		for last := int32(0); ; {
			op, changed, err := n.watch("a")
			if err != nil {
				t.Fatal(err)
			}
			if op.GetBytesTotal() > 0 && op.GetAttempt() > last && (op.GetReason() == opsv1.PullReasonBackOff || op.GetFinishTime() != nil) {
				totals, last = append(totals, op.GetBytesTotal()), op.GetAttempt()
			}
			if op.GetFinishTime() != nil {
				break
			}
			<-changed
		}
		if !slices.Equal(totals, []int64{100, 20, 100}) {
			t.Errorf("the sizes are %v", totals)
		}
	})
}

// A pull that turns out not to fit is ended, and leaves nothing behind, unless there was something before.
func TestEndedWhenItDoesNotFit(t *testing.T) {
	for _, before := range []bool{false, true} {
		inContainerd(t, Options{MaxDiskPercent: 99.9}, func(t *testing.T, n *node) {
			n.rt.disk = n.dir
			small := layer("a", 10)
			huge := blob{Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("huge"), Size: 1 << 45}}
			image := sampleOf(small, huge)
			ended := false
			n.rt.pulling = func(ctx context.Context, req *runtimeapi.PullImageRequest) error {
				if before && len(n.rt.pulls) == 1 {
					return errors.Join(n.bring(ctx, small), broken())
				}
				if err := n.bring(ctx, image.manifest, image.config, small); err != nil {
					return err
				}
				<-ctx.Done()
				ended = true
				return ctx.Err()
			}
			n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", MaxAttempts: 2, AttemptTimeout: nil})
			op := n.end("a")
			if op.GetReason() != opsv1.PullReasonDiskPressure || !strings.Contains(op.GetMessage(), "112.0 TiB more") || !ended {
				t.Errorf("%v", op)
			}
			if l := n.ours(); (len(l) > 0) != before {
				t.Errorf("something was there before: %v; leases: %v", before, l)
			}
		})
	}
}

// A registry that does not answer us costs five seconds, once, and the limit; both are said.
func TestLookUpIsBounded(t *testing.T) {
	inContainerd(t, Options{}, func(t *testing.T, n *node) {
		image := sampleOf(layer("a", 100))
		n.rt.takes = time.Minute
		n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
			return n.bring(ctx, image.manifest, image.config, image.layers[0])
		}
		n.answer = func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		}
		const why = "without the speed limit of 1.0 MiB/s: registry r.io has not told cri-proxy the image's manifest within 5s"
		for i, wait := range []time.Duration{lookupPatience, 0, lookupPatience} {
			uid := name(i)
			n.pull(&opsv1.PullRequest{Uid: uid, Image: "r.io/" + uid, BytesPerSecond: 1 << 20})
			began := time.Now()
			time.Sleep(30 * time.Second)
			if op := n.get(uid); !strings.HasPrefix(op.GetMessage(), "pulling "+why) {
				t.Errorf("under way: %v", op)
			}
			op := n.end(uid)
			if op.GetPhase() != succeeded || op.GetAttempt() != 1 || !strings.HasPrefix(op.GetMessage(), "pulled "+why) {
				t.Errorf("%v", op)
			}
			if took := time.Since(began).Round(time.Second); took != time.Minute+wait {
				t.Errorf("pull %d took %s", i, took)
			}
			if asked := n.requests(); (len(asked) > 0) != (wait > 0) {
				t.Errorf("pull %d: the registry is asked %q", i, asked)
			}
			if i == 1 {
				time.Sleep(lookupMemory)
			}
		}
	})
}

// What is wrong with one image, or slow, says nothing of its registry to others.
func TestRegistriesThatAnswerAreLookedUp(t *testing.T) {
	image := sampleOf(layer("a", 100))
	arm := image.manifest.Descriptor
	arm.Platform = &ocispec.Platform{OS: "plan9", Architecture: "mips"}
	raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{arm}})
	if err != nil {
		t.Fatal(err)
	}
	other := &sample{manifest: blobOf(ocispec.MediaTypeImageIndex, raw)}
	for name, answer := range map[string]func(req *http.Request) (*http.Response, error){
		"hangs": func(req *http.Request) (*http.Response, error) {
			if req.Method == http.MethodHead {
				return image.serve(req)
			}
			<-req.Context().Done()
			return nil, req.Context().Err()
		},
		"goes away": func(req *http.Request) (*http.Response, error) {
			if req.Method == http.MethodHead {
				return image.serve(req)
			}
			time.Sleep(2 * time.Second)
			return nil, errors.New("connection reset by peer")
		},
		"another platform": func(req *http.Request) (*http.Response, error) {
			time.Sleep(2 * time.Second)
			return other.serve(req)
		},
		"no": func(req *http.Request) (*http.Response, error) {
			time.Sleep(2 * time.Second)
			return respond(req, http.StatusInternalServerError, nil), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			inContainerd(t, Options{}, func(t *testing.T, n *node) {
				n.answer = answer
				n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", BytesPerSecond: 1 << 20})
				if op := n.end("a"); !strings.Contains(op.GetMessage(), "pulled without the speed limit") {
					t.Errorf("%v", op)
				}
				n.answer = image.serve
				n.pull(&opsv1.PullRequest{Uid: "b", Image: "r.io/b", BytesPerSecond: 1 << 20})
				if op := n.end("b"); op.GetPhase() != succeeded || op.GetMessage() != "" {
					t.Errorf("%v", op)
				}
			})
		})
	}
}

// What is remembered of a registry is said to others than who asked.
func TestUnreachedRegistryTellsNoImages(t *testing.T) {
	inContainerd(t, Options{BytesPerSecond: 1 << 20}, func(t *testing.T, n *node) {
		n.answer = func(*http.Request) (*http.Response, error) {
			time.Sleep(2 * time.Second)
			return nil, errors.New("dial tcp 192.0.2.1:443: i/o timeout")
		}
		n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/team/secret"})
		n.end("a")
		n.requests()
		n.pull(&opsv1.PullRequest{Uid: "b", Image: "r.io/b"})
		if op := n.end("b"); op.GetMessage() != "pulled without the speed limit of 1.0 MiB/s: registry r.io cannot be used now" || len(n.requests()) > 0 {
			t.Errorf("%v", op)
		}
	})
}

// A look-up does not wait for the limit that its pull has.
func TestLookUpIsNotSlowedDown(t *testing.T) {
	inContainerd(t, Options{}, func(t *testing.T, n *node) {
		image := sampleOf(layer("a", 100))
		config := blobOf(ocispec.MediaTypeImageConfig, bytes.Replace(image.config.raw, []byte("{"), []byte(`{"author":"`+strings.Repeat("x", 2<<20)+`",`), 1))
		image.manifest = blobOf(ocispec.MediaTypeImageManifest, bytes.Replace(image.manifest.raw,
			fmt.Appendf(nil, `%q,"size":%d`, image.config.Digest, image.config.Size), fmt.Appendf(nil, `%q,"size":%d`, config.Digest, config.Size), 1))
		image.config = config
		n.answer = image.serve
		n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", BytesPerSecond: 64 << 10})
		if op := n.end("a"); op.GetPhase() != succeeded || op.GetMessage() != "" || op.GetBytesTotal() != 100 {
			t.Errorf("%v", op)
		}
	})
}

// What a registry says to us is not final, and it is asked the next time: the runtime may have a mirror.
func TestLookUpIsNotFinal(t *testing.T) {
	for _, code := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusTooManyRequests, http.StatusInternalServerError} {
		inContainerd(t, Options{BytesPerSecond: 1 << 20}, func(t *testing.T, n *node) {
			n.answer = func(req *http.Request) (*http.Response, error) { return respond(req, code, nil), nil }
			for i := range 2 {
				n.pull(&opsv1.PullRequest{Uid: name(i), Image: "r.io/" + name(i), MaxAttempts: 1})
				if op := n.end(name(i)); op.GetPhase() != succeeded || !strings.HasPrefix(op.GetMessage(), "pulled without the speed limit of 1.0 MiB/s: ") {
					t.Errorf("%d: %v", code, op)
				}
				if asked := n.requests(); len(asked) == 0 || code == http.StatusTooManyRequests && len(asked) > 1 {
					t.Errorf("%d: the registry is asked %q", code, asked)
				}
			}
			// When the runtime cannot pull either, the limit is not what matters.
			n.rt.set(func() { n.rt.fail = []error{unauthorized()} })
			n.pull(&opsv1.PullRequest{Uid: "no", Image: "r.io/no", MaxAttempts: 1})
			if op := n.end("no"); op.GetReason() != opsv1.PullReasonUnauthorized || strings.Contains(op.GetMessage(), "speed limit") {
				t.Errorf("%d: %v", code, op)
			}
		})
	}
}

// With a limit all that the runtime lacks is in its store before it is asked, and no more than that.
func TestLimitedFetchesWhatIsMissing(t *testing.T) {
	for _, unpacked := range []int{0, 2, 3} {
		inContainerd(t, Options{}, func(t *testing.T, n *node) {
			image := sampleOf(layer("a", 1000), layer("b", 200), layer("c", 30))
			n.answer = image.serve
			n.rt.answer = func(args any) proto.Message {
				if req, ok := args.(*snapshotsapi.StatSnapshotRequest); ok && req.GetSnapshotter() == "zfs" && slices.Contains(image.chain[:unpacked], digest.Digest(req.GetKey())) {
					return &snapshotsapi.StatSnapshotResponse{Info: &snapshotsapi.Info{Name: req.GetKey()}}
				}
				return nil
			}
			n.rt.disk = "/var/lib/containerd/io.containerd.snapshotter.v1.zfs"
			n.rt.pulling = func(ctx context.Context, _ *runtimeapi.PullImageRequest) error {
				for _, b := range append([]blob{image.manifest, image.config}, image.layers[unpacked:]...) {
					if _, err := n.store.content.Info(ctx, b.Digest); err != nil {
						t.Errorf("not there: %v", err)
					}
				}
				kept, err := n.store.leases.ListResources(ctx, leases.Lease{ID: n.ours()[0]})
				if unpacked > 0 && !slices.Contains(kept, leases.Resource{ID: image.chain[unpacked-1].String(), Type: "snapshots/zfs"}) {
					t.Errorf("the snapshots may go: %v, %v", kept, err)
				}
				return nil
			}
			n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", BytesPerSecond: 1 << 20})
			op := n.end("a")
			missing := int64(0)
			for _, l := range image.layers[unpacked:] {
				missing += l.Size
			}
			if op.GetPhase() != succeeded || op.GetMessage() != "" || op.GetBytesTotal() != 1230 || op.GetBytesDone() != 1230 || op.GetBytesFetched() != missing {
				t.Errorf("%d unpacked: %v", unpacked, op)
			}
			// HEAD and GET of the manifest, the config, and the layers.
			if asked := n.requests(); len(asked) != 3+len(image.layers)-unpacked || !strings.HasPrefix(asked[0], "HEAD ") {
				t.Errorf("%d unpacked: the registry is asked %q", unpacked, asked)
			}
		})
	}
}

// Layers that only the runtime can reach are left to it; a registry in trouble is asked again.
func TestLayersOutOfReach(t *testing.T) {
	for name, tt := range map[string]struct {
		answer  func(req *http.Request) (*http.Response, error)
		runtime bool
	}{
		"no way":  {func(*http.Request) (*http.Response, error) { return nil, errors.New("dial tcp: connection refused") }, true},
		"refused": {func(req *http.Request) (*http.Response, error) { return respond(req, http.StatusForbidden, nil), nil }, true},
		"broken":  {func(req *http.Request) (*http.Response, error) { return respond(req, http.StatusBadGateway, nil), nil }, false},
		"too many": {func(req *http.Request) (*http.Response, error) {
			return respond(req, http.StatusTooManyRequests, nil), nil
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			inContainerd(t, Options{}, func(t *testing.T, n *node) {
				image := sampleOf(layer("a", 100))
				n.answer = func(req *http.Request) (*http.Response, error) {
					if strings.HasSuffix(req.URL.Path, image.layers[0].Digest.String()) {
						return tt.answer(req)
					}
					return image.serve(req)
				}
				n.pull(&opsv1.PullRequest{Uid: "a", Image: "r.io/a", BytesPerSecond: 1 << 20, MaxAttempts: 1})
				op := n.end("a")
				if (n.rt.count() > 0) != tt.runtime || (op.GetPhase() == succeeded) != tt.runtime {
					t.Errorf("%d pulls of the runtime: %v", n.rt.count(), op)
				}
				if strings.Contains(op.GetMessage(), "pulled without the speed limit") != tt.runtime {
					t.Errorf("%v", op)
				}
			})
		})
	}
}

// beside has one pull hold the runtime's download slots for a minute, and begins one that something waits for.
func (n *node) beside(uid string) {
	n.t.Helper()
	n.rt.set(func() { n.rt.takes = time.Minute })
	n.pull(&opsv1.PullRequest{Uid: "beside", Image: "other.io/beside"})
	if _, err := n.take(&opsv1.PullRequest{Uid: uid, Image: "r.io/" + uid, MaxAttempts: 1}, true); err != nil {
		n.t.Fatal(err)
	}
}

// Without a limit what the registry says to us is never final, whatever it is.
func TestLayersAreLeftToTheRuntime(t *testing.T) {
	for name, answer := range map[string]func(req *http.Request) (*http.Response, error){
		"too many": func(req *http.Request) (*http.Response, error) {
			return respond(req, http.StatusTooManyRequests, nil), nil
		},
		"broken":      func(req *http.Request) (*http.Response, error) { return respond(req, http.StatusBadGateway, nil), nil },
		"other bytes": func(req *http.Request) (*http.Response, error) { return respond(req, http.StatusOK, []byte("x")), nil },
	} {
		t.Run(name, func(t *testing.T) {
			inContainerd(t, Options{}, func(t *testing.T, n *node) {
				n.rt.disk = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs"
				image := sampleOf(layer("a", 100))
				asked := false
				n.answer = func(req *http.Request) (*http.Response, error) {
					if strings.HasSuffix(req.URL.Path, image.layers[0].Digest.String()) {
						asked = true
						return answer(req)
					}
					return image.serve(req)
				}
				n.beside("a")
				op := n.end("a")
				if op.GetPhase() != succeeded || op.GetMessage() != "" || n.rt.count() != 2 || !asked {
					t.Errorf("%d pulls of the runtime, asked here %v: %v", n.rt.count(), asked, op)
				}
				n.end("beside")
			})
		})
	}
}

// A snapshotter that may need no layers gets what it asks for and no more.
func TestLazySnapshotters(t *testing.T) {
	for snapshotter, here := range map[string]bool{"overlayfs": true, "stargz": false, "soci": false, "": false} {
		inContainerd(t, Options{}, func(t *testing.T, n *node) {
			if snapshotter != "" {
				n.rt.disk = "/var/lib/containerd/io.containerd.snapshotter.v1." + snapshotter
			}
			image := sampleOf(layer("a", 100))
			n.answer = image.serve
			n.beside("a")
			if op := n.end("a"); op.GetPhase() != succeeded || n.rt.count() != 2 {
				t.Errorf("%q: %v", snapshotter, op)
			}
			if asked := n.requests(); (len(asked) > 0) != here {
				t.Errorf("%q: the registry is asked %q", snapshotter, asked)
			}
			n.end("beside")
		})
	}
}

// A runtime that is not containerd knows no limit.
func TestNoLimitWithoutContainerd(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", BytesPerSecond: 1 << 20})
		if op := b.end("a"); op.GetPhase() != succeeded || op.GetMessage() != "pulled without the speed limit of 1.0 MiB/s: the runtime is not containerd" {
			t.Errorf("%v", op)
		}
	})
}

func TestSnapshotter(t *testing.T) {
	const config = `{"containerd":{"runtimes":{"runc":{"snapshotter":""},"kata":{"snapshotter":"devmapper"}}}}`
	for _, tt := range []struct{ name, disk, root, handler, want string }{
		{"default", "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs", "", "", "overlayfs"},
		{"handler without its own", "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs", "", "runc", "overlayfs"},
		{"handler that is not known", "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs", "", "gvisor", "overlayfs"},
		{"handler with its own", "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs", "", "kata", "devmapper"},
		{"elsewhere", "/data/snapshots", "/data/snapshots/", "", "native"},
		{"not told", "/data/snapshots", "/data/other", "", ""},
		{"nothing", "", "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, Options{}, func(t *testing.T, b *bubble) {
				b.rt.disk = tt.disk
				b.rt.answer = func(args any) proto.Message {
					switch args.(type) {
					case *runtimeapi.StatusRequest:
						return &runtimeapi.StatusResponse{Info: map[string]string{"config": config}}
					case *introspectionapi.PluginsRequest:
						return &introspectionapi.PluginsResponse{Plugins: []*introspectionapi.Plugin{{ID: "native", Exports: map[string]string{"root": tt.root}}}}
					}
					return nil
				}
				if got := b.snapshotter(t.Context(), tt.handler); got != tt.want {
					t.Errorf("%q, want %q", got, tt.want)
				}
			})
		})
	}
}
