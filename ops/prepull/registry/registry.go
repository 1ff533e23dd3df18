// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package registry asks registries for images as the runtime would: what an image's name means, its
// manifest, and its layers, within a speed limit. It also says what the errors of registries mean.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

const (
	// headerTimeout bounds the wait for a registry's answer to begin.
	headerTimeout = 30 * time.Second
	// stallTimeout is how long a layer may stand still before its transfer is given up.
	// containerd's own limit is image_pull_progress_timeout, 5 minutes.
	stallTimeout = 2 * time.Minute
	// layersAtOnce is containerd's max_concurrent_downloads.
	layersAtOnce = 3
	// A limited transfer has one connection for each perConnection bytes a second. What a
	// connection has read and not handed on is lost when the transfer is cut off. Its buffer holds
	// the connection's part of the limit for bufferFor seconds, which is a long round trip.
	perConnection = 10 << 20
	bufferFor     = .05
	minBuffer     = 64 << 10
	maxBuffer     = 4 << 20
	// minBurst lets a limited transfer take what one read brings.
	minBurst = 256 << 10
)

// ErrStalled ends a transfer that stands still.
var ErrStalled = errors.New("the registry sends nothing any more")

// Image is an image in a registry, reached with one credential.
type Image struct {
	resolver remotes.Resolver
	ref      string // as the registry host understands it
	desc     ocispec.Descriptor

	mu    sync.Mutex // guards conns
	conns []*http.Transport

	authorizing sync.Mutex // held while a request is authorized

	read     atomic.Int64 // bytes of all answers
	answered atomic.Bool  // a registry has answered, whatever the answer was
	looking  atomic.Bool  // what is read is bounded, and is not slowed down
}

// oneByOne authorizes one request at a time. containerd's authorizer reads the expiry of a token
// while another request fetches the token (remotes/docker, doBearerAuth). The requests would wait
// for that token anyway.
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

// Hosts finds how registries are reached, as the runtime would. options have the credentials of one
// image and the hook for clients (UpdateClient). Hosts is called for each image anew, so that it
// sees what has changed meanwhile.
type Hosts func(ctx context.Context, options config.HostOptions) (docker.RegistryHosts, error)

// HostsFrom reads containerd's config_path, and nothing else of its configuration. An empty dir
// means /etc/containerd/certs.d.
func HostsFrom(dir string) Hosts {
	if dir == "" {
		dir = "/etc/containerd/certs.d"
	}
	return func(ctx context.Context, options config.HostOptions) (docker.RegistryHosts, error) {
		options.HostDir = config.HostDirFromRoot(dir)
		return config.ConfigureHosts(ctx, options), nil
	}
}

// NewImage returns the image that ref, in full form, names. It asks the registry for nothing yet.
// Both credential and limit may be nil. The caller closes the image.
func NewImage(
	ctx context.Context, find Hosts, ref string, credential *opsv1.RegistryCredential, limit *rate.Limiter,
) (*Image, error) {
	r := &Image{ref: ref}
	options := config.HostOptions{
		UpdateClient: func(c *http.Client) error {
			if t, ok := c.Transport.(*http.Transport); ok {
				t.ResponseHeaderTimeout = headerTimeout
				t.DialContext = impatient(t.DialContext)
				if limit != nil {
					t.DialContext = smallBuffers(t.DialContext, limit)
				}
				r.mu.Lock()
				r.conns = append(r.conns, t)
				r.mu.Unlock()
			}
			// A host with headers of its own gets a copy of a client that has been here before.
			if _, ok := c.Transport.(*meter); !ok {
				c.Transport = &meter{next: c.Transport, limit: limit, r: r}
			}
			return nil
		},
	}
	if auth := AuthConfig(credential); auth != nil {
		// A refresh token goes without a user name, as in containerd's CRI plugin.
		name, secret := auth.GetUsername(), auth.GetPassword()
		if auth.GetIdentityToken() != "" {
			name, secret = "", auth.GetIdentityToken()
		}
		options.Credentials = func(string) (string, string, error) { return name, secret, nil }
	}
	hosts, err := find(ctx, options)
	if err != nil {
		return nil, fmt.Errorf("how registries are reached: %w", err)
	}
	r.resolver = docker.NewResolver(docker.ResolverOptions{Hosts: func(host string) ([]docker.RegistryHost, error) {
		list, err := hosts(host)
		for i := range list {
			if list[i].Authorizer == nil {
				continue
			}
			list[i].Authorizer = &oneByOne{mu: &r.authorizing, Authorizer: list[i].Authorizer}
		}
		return list, err
	}})
	return r, nil
}

// Answered reports whether a registry has answered, whatever the answer was.
func (r *Image) Answered() bool { return r.answered.Load() }

// BytesRead is how many bytes of answers have come.
func (r *Image) BytesRead() int64 { return r.read.Load() }

// Resolve asks what the image's name means, with HEAD as the runtime does.
func (r *Image) Resolve(ctx context.Context) error {
	r.looking.Store(true)
	defer r.looking.Store(false)
	ref, desc, err := r.resolver.Resolve(ctx, r.ref)
	if err == nil {
		r.ref, r.desc = ref, desc
	}
	return err
}

type dial = func(ctx context.Context, network, addr string) (net.Conn, error)

// impatient gives up early on hosts that do not answer: a registry may redirect to a host that only
// the runtime reaches, through its proxy.
func impatient(next dial) dial {
	if next == nil {
		next = (&net.Dialer{}).DialContext
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, LookUpTimeout)
		defer cancel()
		return next(ctx, network, addr)
	}
}

// smallBuffers makes connections hold little that has not been read. What waits in the kernel when
// a slow transfer is cut off is lost and comes again. By default that is several MiB a connection.
func smallBuffers(next dial, limit *rate.Limiter) dial {
	size := min(max(int(float64(limit.Limit())*bufferFor)/connections(limit), minBuffer), maxBuffer)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := next(ctx, network, addr)
		if c, ok := conn.(*net.TCPConn); ok {
			_ = c.SetReadBuffer(size)
		}
		return conn, err
	}
}

// Close closes the connections that are kept for further requests.
func (r *Image) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.conns {
		t.CloseIdleConnections()
	}
}

// Manifest fetches the image's manifests and config, which are a few kilobytes, into the content
// store and returns the layers for this node's platform. It does not fetch what is there. Call
// Resolve before.
func (r *Image) Manifest(ctx context.Context, store content.Store) (*imagestore.Manifest, error) {
	r.looking.Store(true)
	defer r.looking.Store(false)
	fetcher, err := r.resolver.Fetcher(ctx, r.ref)
	if err != nil {
		return nil, err
	}
	return imagestore.ReadManifest(ctx, provider{store, fetcher}, r.desc)
}

// provider fetches blobs of a registry into the content store and reads them there.
type provider struct {
	store   content.Store
	fetcher remotes.Fetcher
}

var _ content.Provider = provider{}

// ReaderAt implements [content.Provider] for manifests and configs.
func (p provider) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	if err := fetch(ctx, p.store, noLonger{p.fetcher}, d); err != nil {
		return nil, err
	}
	return p.store.ReaderAt(ctx, d)
}

// noLonger reads no more of a blob than its descriptor says, and one byte.
type noLonger struct{ remotes.Fetcher }

// Fetch implements [remotes.Fetcher].
func (f noLonger) Fetch(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	rc, err := f.Fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(rc, d.Size+1), rc}, nil
}

// Layers fetches the layers into the content store. It does not fetch again what is there, be it a
// part of a layer. limit is the one of [NewImage].
func (r *Image) Layers(
	ctx context.Context, log logrus.FieldLogger, store content.Store, layers []ocispec.Descriptor, limit *rate.Limiter,
) error {
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

// meter slows down the reading of responses, and gives up on responses that stand still.
type meter struct {
	next  http.RoundTripper
	limit *rate.Limiter // nil: none
	r     *Image
}

// RoundTrip implements [http.RoundTripper].
func (m *meter) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := m.next.RoundTrip(req)
	if err == nil {
		m.r.answered.Store(true)
	}
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

func (b *meteredBody) Read(p []byte) (int, error) {
	l := b.m.limit
	if b.m.r.looking.Load() {
		l = nil
	}
	if l != nil && len(p) > l.Burst() {
		p = p[:l.Burst()]
	}
	stalled := time.AfterFunc(stallTimeout, func() { _ = b.Close() })
	n, err := b.ReadCloser.Read(p)
	b.m.r.read.Add(int64(n))
	if !stalled.Stop() && err != nil {
		err = fmt.Errorf("%w (%s)", ErrStalled, stallTimeout)
	}
	if l != nil && n > 0 {
		if werr := l.WaitN(b.ctx(), n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}

// connections is how many layers are fetched at the same time.
func connections(limit *rate.Limiter) int {
	if limit == nil {
		return layersAtOnce
	}
	return min(max(int(limit.Limit()/perConnection), 1), layersAtOnce)
}

// NewLimiter returns a limiter for bytes per second; nil for no limit.
func NewLimiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(max(minBurst, bytesPerSecond/10)))
}
