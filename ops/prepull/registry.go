// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

const (
	// headerPatience bounds the wait for a registry's answer to begin.
	headerPatience = 30 * time.Second
	// stallPatience is how long a layer may stand still before its transfer is given up: containerd's own is
	// image_pull_progress_timeout, 5 minutes.
	stallPatience = 2 * time.Minute
	// layersAtOnce is containerd's max_concurrent_downloads.
	layersAtOnce = 3
	// A limited transfer has a connection for each perConnection bytes a second: what they have read and not handed on is
	// lost when it is cut off. The buffer of each holds its part of the limit for bufferFor seconds, a long round trip.
	perConnection = 10 << 20
	bufferFor     = .05
	minBuffer     = 64 << 10
	maxBuffer     = 4 << 20
	// minBurst lets a limited transfer take what one read brings.
	minBurst = 256 << 10
)

// manifest is what is to be fetched for this node's platform.
type manifest struct {
	layers []ocispec.Descriptor
	total  int64
}

// remote is an image in a registry, seen with one credential.
type remote struct {
	resolver remotes.Resolver
	ref      string // as the registry host understands it
	desc     ocispec.Descriptor

	mu    sync.Mutex // guards conns
	conns []*http.Transport

	authorizing sync.Mutex // held while a request is authorized
}

// oneByOne authorizes one request at a time. containerd's authorizer reads the expiry of a token that another request is
// fetching (remotes/docker, doBearerAuth); others would wait for that token anyway.
type oneByOne struct {
	docker.Authorizer
	mu *sync.Mutex
}

// Authorize implements [docker.Authorizer].
func (o *oneByOne) Authorize(ctx context.Context, req *http.Request) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Authorizer.Authorize(ctx, req)
}

// Hosts finds how registries are reached, as the runtime would. options have the credentials and the hook for clients
// (UpdateClient) of one image; it is asked for each image anew, so that what has changed meanwhile counts.
type Hosts func(ctx context.Context, options config.HostOptions) (docker.RegistryHosts, error)

// hostsFrom reads containerd's config_path, and nothing else of its configuration.
func hostsFrom(dir string) Hosts {
	if dir == "" {
		dir = "/etc/containerd/certs.d"
	}
	return func(ctx context.Context, options config.HostOptions) (docker.RegistryHosts, error) {
		options.HostDir = config.HostDirFromRoot(dir)
		return config.ConfigureHosts(ctx, options), nil
	}
}

// newRemote looks the image up. limit may be nil. The caller calls close, also after an error.
func newRemote(ctx context.Context, find Hosts, ref string, credential *opsv1.RegistryCredential, limit *rate.Limiter) (*remote, error) {
	r := &remote{}
	options := config.HostOptions{
		UpdateClient: func(c *http.Client) error {
			if t, ok := c.Transport.(*http.Transport); ok {
				t.ResponseHeaderTimeout = headerPatience
				if limit != nil {
					t.DialContext = smallBuffers(t.DialContext, limit)
				}
				r.mu.Lock()
				r.conns = append(r.conns, t)
				r.mu.Unlock()
			}
			// A host with headers of its own gets a copy of a client that has been here before.
			if _, ok := c.Transport.(*meter); !ok {
				c.Transport = &meter{next: c.Transport, limit: limit}
			}
			return nil
		},
	}
	if auth := authConfig(credential); auth != nil {
		// A refresh token without a name, as containerd's CRI plugin does it.
		name, secret := auth.GetUsername(), auth.GetPassword()
		if auth.GetIdentityToken() != "" {
			name, secret = "", auth.GetIdentityToken()
		}
		options.Credentials = func(string) (string, string, error) { return name, secret, nil }
	}
	hosts, err := find(ctx, options)
	if err != nil {
		return r, fmt.Errorf("how registries are reached: %w", err)
	}
	r.resolver = docker.NewResolver(docker.ResolverOptions{Hosts: func(host string) ([]docker.RegistryHost, error) {
		list, err := hosts(host)
		for i := range list {
			list[i].Authorizer = &oneByOne{mu: &r.authorizing, Authorizer: list[i].Authorizer}
		}
		return list, err
	}})
	r.ref, r.desc, err = r.resolver.Resolve(ctx, ref)
	return r, err
}

// smallBuffers makes connections hold little that has not been read. When a slow transfer is cut off, what waits in the kernel is
// lost and comes again: that is several MiB a connection by default.
func smallBuffers(dial func(ctx context.Context, network, addr string) (net.Conn, error), limit *rate.Limiter) func(ctx context.Context, network, addr string) (net.Conn, error) {
	size := min(max(int(float64(limit.Limit())*bufferFor)/connections(limit), minBuffer), maxBuffer)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if c, ok := conn.(*net.TCPConn); ok {
			_ = c.SetReadBuffer(size)
		}
		return conn, err
	}
}

// close lets go of connections that are kept for further requests.
func (r *remote) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.conns {
		t.CloseIdleConnections()
	}
}

// manifest asks for the image's manifests, which are a few kilobytes, and returns the layers for this node's
// platform. Nothing is written.
func (r *remote) manifest(ctx context.Context) (*manifest, error) {
	fetcher, err := r.resolver.Fetcher(ctx, r.ref)
	if err != nil {
		return nil, err
	}
	found, err := images.Manifest(ctx, provider{fetcher}, r.desc, platforms.Default())
	if err != nil {
		return nil, err
	}
	m := &manifest{layers: found.Layers}
	for _, l := range m.layers {
		if err := l.Digest.Validate(); err != nil || l.Size < 0 || l.Size > maxLayer {
			return nil, fmt.Errorf("manifest %s: layer %q of %d bytes: %w", r.desc.Digest, l.Digest, l.Size, errdefs.ErrInvalidArgument)
		}
		m.total += l.Size
	}
	return m, nil
}

// maxManifest is what containerd takes of a manifest, too (core/images, maxManifestSize).
const maxManifest = 8 << 20

// maxLayer keeps sums of what a registry says from running over.
const maxLayer = 1 << 50

// provider has the blobs of a registry as a content store has them.
type provider struct{ fetcher remotes.Fetcher }

var _ content.Provider = provider{}

// ReaderAt implements [content.Provider] for manifests and configs.
func (p provider) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	if d.Size > maxManifest {
		return nil, fmt.Errorf("%s: a manifest of %d bytes: %w", d.Digest, d.Size, errdefs.ErrInvalidArgument)
	}
	rc, err := p.fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	raw, err := io.ReadAll(io.LimitReader(rc, maxManifest))
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(raw); got != d.Digest {
		return nil, fmt.Errorf("%s: the registry has sent something else (%s): %w", d.Digest, got, errdefs.ErrInvalidArgument)
	}
	return blob{bytes.NewReader(raw)}, nil
}

type blob struct{ *bytes.Reader }

// Close implements [io.Closer].
func (blob) Close() error { return nil }

// layers fetches the layers into the content store. What is there, in part or as a whole, is not fetched again.
func (r *remote) layers(ctx context.Context, log logrus.FieldLogger, store content.Store, layers []ocispec.Descriptor, limit *rate.Limiter) error {
	fetcher, err := r.resolver.Fetcher(ctx, r.ref)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(connections(limit))
	for _, d := range layers {
		g.Go(func() error { return guard.Try(log, func() error { return fetch(ctx, store, fetcher, d) }) })
	}
	return g.Wait()
}

// fetch fetches one blob unless it is there.
func fetch(ctx context.Context, store content.Store, fetcher remotes.Fetcher, d ocispec.Descriptor) error {
	if err := remotes.Fetch(ctx, store, fetcher, d); !errdefs.IsAlreadyExists(err) {
		return err
	}
	return nil
}

// meter slows down what is read from responses, and gives up on those that stand still.
type meter struct {
	next  http.RoundTripper
	limit *rate.Limiter // nil: not slowed down
}

// RoundTrip implements [http.RoundTripper].
func (m *meter) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := m.next.RoundTrip(req)
	if err == nil && resp.StatusCode == http.StatusTooManyRequests {
		// The resolver would ask five times in a row.
		defer resp.Body.Close()
		return nil, remoteerrors.NewUnexpectedStatusErr(resp)
	}
	if err == nil {
		resp.Body = &meteredBody{ReadCloser: resp.Body, m: m, ctx: req.Context}
	}
	return resp, err
}

type meteredBody struct {
	io.ReadCloser
	m   *meter
	ctx func() context.Context // the request's
}

// errStalled ends a transfer that stands still.
var errStalled = errors.New("the registry sends nothing any more")

func (b *meteredBody) Read(p []byte) (int, error) {
	if l := b.m.limit; l != nil && len(p) > l.Burst() {
		p = p[:l.Burst()]
	}
	stalled := time.AfterFunc(stallPatience, func() { _ = b.Close() })
	n, err := b.ReadCloser.Read(p)
	if !stalled.Stop() && err != nil {
		err = fmt.Errorf("%w (%s)", errStalled, stallPatience)
	}
	if l := b.m.limit; l != nil && n > 0 {
		if werr := l.WaitN(b.ctx(), n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}

// connections is how many layers are fetched at once.
func connections(limit *rate.Limiter) int {
	return min(max(int(limit.Limit()/perConnection), 1), layersAtOnce)
}

// newLimiter returns a limiter for bytes per second; nil for no limit.
func newLimiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(max(minBurst, bytesPerSecond/10)))
}
