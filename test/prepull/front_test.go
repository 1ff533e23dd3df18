// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/time/rate"
)

// front stands before the bed's registry under a host name of its own, counts what goes through,
// and does what a test says.
type front struct {
	host string // for image names
	addr string

	bytes    atomic.Int64 // of blobs, to clients
	requests atomic.Int64
	blobs    atomic.Int64 // requests for blobs
	ranges   atomic.Int64 // of those, for a part
	sending  atomic.Int64 // of those, how many are under way
	limit    atomic.Pointer[rate.Limiter]

	mu       sync.Mutex                 // guards all following fields
	asked    map[string]int             // requests that were let in, such as "HEAD manifests"
	deaf     func(r *http.Request) bool // whom to hang on until he goes away; nil: nobody
	stop     int64                      // send no more than so many bytes of blobs
	released chan struct{}              // closed when that ends; nil: no end to what is sent
	status   int                        // answer everything with this
	left     int                        // that many times; -1 for ever
	user     string                     // asked for when set
	secret   string
	hang     chan struct{} // closed when hanging ends; nil: no hanging
	cut      int64         // cut a blob after so many bytes
	cuts     int           // that many times
}

// newFront starts a front and makes its host name known to containerd and to cri-proxy.
func newFront(t testing.TB, host string) *front {
	t.Helper()
	f := &front{host: host}
	backend := &url.URL{Scheme: "http", Host: bed.Registry}
	proxy := &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(backend) },
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) {}, // clients that go away
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	f.addr = l.Addr().String()
	//nolint:gosec // clients are our own
	server := &http.Server{Handler: f.handler(proxy), ConnContext: func(
		ctx context.Context, c net.Conn,
	) context.Context {
		_ = c.(*net.TCPConn).SetWriteBuffer(64 << 10) // what waits here is counted and not fetched
		return ctx
	}}
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		f.release()
		f.goOn()
		_ = server.Close()
		served.Wait()
	})
	must(t, bed.MapRegistry(host, "http://"+f.addr))
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), host)) })
	return f
}

// image is a name that leads here.
func (f *front) image(name string) string { return f.host + "/" + name }

// throttle bounds all clients together, in bytes a second; 0 is no bound.
func (f *front) throttle(bytesPerSecond int64) {
	if bytesPerSecond == 0 {
		f.limit.Store(nil)
		return
	}
	f.limit.Store(rate.NewLimiter(rate.Limit(bytesPerSecond), 64<<10))
}

// answer makes the next n requests fail with the status; -1 is all of them.
func (f *front) answer(status, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status, f.left = status, n
}

func (f *front) protect(user, secret string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.user, f.secret = user, secret
}

// freeze makes every request hang until release.
func (f *front) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang = make(chan struct{})
}

func (f *front) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hang != nil {
		close(f.hang)
		f.hang = nil
	}
}

// hold sends no more than a share of the image, the first that this front sends, until goOn; 6 is
// six tenths. What a test does to a pull that is half done then finds it under way, however late it
// comes.
func (f *front) hold(p pushed, tenths int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.released != nil {
		close(f.released) // they wait again, at the new point
	}
	f.stop, f.released = p.size*tenths/10, make(chan struct{})
}

func (f *front) goOn() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.released != nil {
		close(f.released)
		f.released = nil
	}
}

// wait waits where hold has said, or until the client has gone.
func (f *front) wait(ctx context.Context) error {
	f.mu.Lock()
	released := f.released
	if f.bytes.Load() < f.stop {
		released = nil
	}
	f.mu.Unlock()
	if released == nil {
		return nil
	}
	select {
	case <-released:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// cutBlobs ends n answers after so many bytes of a blob.
func (f *front) cutBlobs(after int64, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut, f.cuts = after, n
}

// requestsOf counts the requests of each kind that come while do runs.
func (f *front) requestsOf(do func()) map[string]int {
	f.mu.Lock()
	f.asked = map[string]int{}
	f.mu.Unlock()
	do()
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.asked)
}

// kind is the method of a request and what it is for.
func kind(r *http.Request) string {
	for _, what := range []string{"manifests", "blobs"} {
		if strings.Contains(r.URL.Path, "/"+what+"/") {
			return r.Method + " " + what
		}
	}
	return r.Method + " other"
}

func (f *front) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		f.mu.Lock()
		if f.asked != nil {
			f.asked[kind(r)]++
		}
		status, hang, user, secret, deaf := 0, f.hang, f.user, f.secret, f.deaf
		if f.left != 0 {
			status = f.status
			f.left = max(f.left-1, -1)
		}
		f.mu.Unlock()
		if deaf != nil && deaf(r) {
			<-r.Context().Done()
			return
		}
		if hang != nil {
			select {
			case <-hang:
			case <-r.Context().Done():
				return
			}
		}
		if u, p, ok := r.BasicAuth(); user != "" && (!ok || u != user || p != secret) {
			w.Header().Set("WWW-Authenticate", `Basic realm="front"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		if status != 0 {
			http.Error(w, "no", status)
			return
		}
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Method != http.MethodGet {
			next.ServeHTTP(w, r)
			return
		}
		f.blobs.Add(1)
		f.sending.Add(1)
		defer f.sending.Add(-1)
		if r.Header.Get("Range") != "" {
			f.ranges.Add(1)
		}
		next.ServeHTTP(&blobWriter{ResponseWriter: w, f: f, ctx: r.Context()}, r)
	})
}

// blobWriter is the answer with a blob.
type blobWriter struct {
	http.ResponseWriter
	f    *front
	ctx  context.Context //nolint:containedctx // of the request that it answers
	sent int64
}

// ReadFrom would let the answer pass by.
func (b *blobWriter) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{b}, r)
}

func (b *blobWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n := min(len(p), 32<<10)
		if err := b.f.wait(b.ctx); err != nil {
			return written, err
		}
		if l := b.f.limit.Load(); l != nil {
			if err := l.WaitN(b.ctx, n); err != nil {
				return written, err
			}
		}
		m, err := b.ResponseWriter.Write(p[:n])
		written += m
		b.sent += int64(m)
		b.f.bytes.Add(int64(m))
		if err != nil {
			return written, err
		}
		p = p[n:]
		if b.f.cutNow(b.sent) {
			panic(http.ErrAbortHandler)
		}
	}
	return written, nil
}

// Unwrap lets the server flush.
func (b *blobWriter) Unwrap() http.ResponseWriter { return b.ResponseWriter }

func (f *front) cutNow(sent int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cuts == 0 || sent < f.cut {
		return false
	}
	f.cuts--
	return true
}
