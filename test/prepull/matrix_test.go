// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// signature is in the addresses that a crooked registry redirects to: whoever reads it may read the
// blob.
const signature = "hush-9XkQ2f"

// crooked is a registry that misbehaves. It counts what it is asked, by kind.
type crooked struct {
	host    string
	storage string // host:port where its blobs are when it redirects
	rule    func(*crooked, http.ResponseWriter, *http.Request, string) (answered bool)
	ended   chan struct{} // closed when the test ends
	backend http.Handler

	mu     sync.Mutex     // guards all following fields
	asked  map[string]int // by kind; "401" are those that were answered so
	bytes  int64          // of blobs
	passed string         // headers of a request for a blob that came to the storage
	times  int            // that rule has had its way
}

// newCrooked starts a registry, and its storage on another address, and makes it known to the node.
// more are lines of its hosts.toml.
func newCrooked(
	t *testing.T, host string, rule func(*crooked, http.ResponseWriter, *http.Request, string) bool, more ...string,
) *crooked {
	t.Helper()
	c := &crooked{host: host, rule: rule, ended: make(chan struct{}), asked: map[string]int{},
		backend: &httputil.ReverseProxy{
			Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: bed.Registry}) },
			ErrorHandler: func(http.ResponseWriter, *http.Request, error) {}, // clients that go away
		}}
	var served sync.WaitGroup
	serve := func(ip string, h http.HandlerFunc) (addr string) {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(ip, "0"))
		must(t, err)
		server := &http.Server{Handler: h} //nolint:gosec // clients are our own
		served.Go(func() { _ = server.Serve(l) })
		t.Cleanup(func() { _ = server.Close() })
		return l.Addr().String()
	}
	t.Cleanup(served.Wait) // after the servers are closed
	addr := serve("127.0.0.1", c.serve)
	c.storage = serve(bed.BridgeIP, c.store)
	t.Cleanup(func() { close(c.ended) })
	must(t, bed.MapRegistry(host, "http://"+addr, more...))
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), host)) })
	return c
}

// asksFor is what a request asks for.
func asksFor(r *http.Request) string {
	what := "other"
	switch {
	case strings.Contains(r.URL.Path, "/manifests/sha256:"):
		what = "manifest"
	case strings.Contains(r.URL.Path, "/manifests/"):
		what = "tag"
	case strings.Contains(r.URL.Path, "/blobs/"):
		what = "blob"
	}
	return r.Method + " " + what
}

func (c *crooked) count(kind string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked[kind]++
}

// once is true for the first n times.
func (c *crooked) once(n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.times++
	return c.times <= n
}

func (c *crooked) serve(w http.ResponseWriter, r *http.Request) {
	k := asksFor(r)
	c.count(k)
	if c.rule != nil && c.rule(c, &refusal{w, c, k}, r, k) {
		return
	}
	c.backend.ServeHTTP(&counted{ResponseWriter: w, c: c, blob: k == "GET blob"}, r)
}

// refusal counts a request that is answered with 401 as such.
type refusal struct {
	http.ResponseWriter
	c    *crooked
	kind string
}

func (w *refusal) WriteHeader(status int) {
	if status == http.StatusUnauthorized {
		w.c.mu.Lock()
		w.c.asked[w.kind]--
		w.c.asked["401"]++
		w.c.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(status)
}

// store has the blobs, for those who come with a signature and no credentials, as the storage of
// clouds has them.
func (c *crooked) store(w http.ResponseWriter, r *http.Request) {
	c.count("storage")
	c.mu.Lock()
	c.passed = fmt.Sprintf("X-Team %q, Authorization %v", r.Header.Values("X-Team"),
		r.Header.Get("Authorization") != "")
	c.mu.Unlock()
	switch {
	case r.Header.Get("Authorization") != "":
		http.Error(w, "two kinds of credentials", http.StatusBadRequest)
	case r.URL.Query().Get("signature") != signature:
		http.Error(w, "no", http.StatusForbidden)
	default:
		c.backend.ServeHTTP(&counted{ResponseWriter: w, c: c, blob: true}, r)
	}
}

// counted counts what is answered.
type counted struct {
	http.ResponseWriter
	c    *crooked
	blob bool
	cuts int // so many answers that are large, for all requests, are cut off
	cut  int // after so many bytes
	sent int
}

func (w *counted) WriteHeader(status int) {
	if length, _ := strconv.Atoi(w.Header().Get("Content-Length")); length > mib/2 && w.cuts > 0 && w.c.once(w.cuts) {
		w.cut = 300 << 10
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *counted) Write(p []byte) (int, error) {
	if w.cut > 0 {
		p = p[:min(len(p), w.cut-w.sent)]
	}
	n, err := w.ResponseWriter.Write(p)
	w.sent += n
	if w.blob {
		w.c.mu.Lock()
		w.c.bytes += int64(n)
		w.c.mu.Unlock()
	}
	if w.cut > 0 && w.sent >= w.cut {
		panic(http.ErrAbortHandler)
	}
	return n, err
}

type rule = func(*crooked, http.ResponseWriter, *http.Request, string) bool

// status answers requests of a kind so; all of them when it is empty.
func answers(status int, of string) rule {
	return func(_ *crooked, w http.ResponseWriter, _ *http.Request, kind string) bool {
		if !strings.Contains(kind, of) {
			return false
		}
		if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", `Basic realm="crooked"`)
		}
		http.Error(w, "no", status)
		return true
	}
}

// first has a rule its way for n requests.
func first(n int, then rule) rule {
	return func(c *crooked, w http.ResponseWriter, r *http.Request, kind string) bool {
		return c.once(n) && then(c, w, r, kind)
	}
}

// redirects sends those who ask for blobs elsewhere.
func redirects(query string) rule {
	return func(c *crooked, w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind != "GET blob" {
			return false
		}
		http.Redirect(w, r, "http://"+c.storage+r.URL.Path+"?signature="+query, http.StatusTemporaryRedirect)
		return true
	}
}

// protected asks for a password first.
func protected(then rule) rule {
	return func(c *crooked, w http.ResponseWriter, r *http.Request, kind string) bool {
		if user, secret, _ := r.BasicAuth(); user != "robot" || secret != password {
			return answers(http.StatusUnauthorized, "")(c, w, r, kind)
		}
		return then(c, w, r, kind)
	}
}

// token gives everybody a token, elsewhere.
func token(c *crooked, w http.ResponseWriter, r *http.Request, _ string) bool {
	if strings.HasPrefix(r.URL.Path, "/token") {
		_, _ = fmt.Fprintf(w, `{"token": %q, "expires_in": 300}`, password)
		return true
	}
	if r.Header.Get("Authorization") == "Bearer "+password {
		return false
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="crooked"`, r.Host))
	http.Error(w, "no", http.StatusUnauthorized)
	return true
}

func hangs(c *crooked, _ http.ResponseWriter, r *http.Request, _ string) bool {
	select {
	case <-c.ended:
	case <-r.Context().Done():
	}
	panic(http.ErrAbortHandler)
}

func cuts(*crooked, http.ResponseWriter, *http.Request, string) bool { panic(http.ErrAbortHandler) }

// cutsLayers cuts the first three answers with layers off in the middle.
func cutsLayers(c *crooked, w http.ResponseWriter, r *http.Request, kind string) bool {
	if kind == "GET blob" {
		c.backend.ServeHTTP(&counted{ResponseWriter: w, c: c, blob: true, cuts: 3}, r)
	}
	return kind == "GET blob"
}

// withoutDigest leaves out the header that says what a tag is.
func withoutDigest(c *crooked, w http.ResponseWriter, r *http.Request, kind string) bool {
	if !strings.HasSuffix(kind, " tag") {
		return false
	}
	c.backend.ServeHTTP(&undigested{w}, r)
	return true
}

type undigested struct{ http.ResponseWriter }

func (w *undigested) WriteHeader(status int) {
	w.Header().Del("Docker-Content-Digest")
	w.ResponseWriter.WriteHeader(status)
}

// TestMatrix has registries with every trouble, and pulls with and without limit beside the
// runtime's own pull around the proxy, which says what is right: what succeeds, and how often a
// registry that counts is asked.
func TestMatrix(t *testing.T) {
	const team = `header = {"X-Team" = ["a"]}`
	for _, tt := range []struct {
		name     string
		rule     rule
		reason   string
		attempts int32 // of 2; 0: one or two
		secret   bool  // pulled with a password
		again    bool  // and once more with policy Always, when it is there
		hosts    string
	}{
		{name: "well", again: true, reason: "Pulled", attempts: 1},
		{name: "401", rule: answers(401, ""), reason: "Unauthorized", attempts: 2},
		{name: "403", rule: answers(403, ""), reason: "Unauthorized", attempts: 2},
		{name: "404", rule: answers(404, ""), reason: "NotFound", attempts: 2},
		{name: "429", rule: answers(429, ""), reason: "TooManyRequests", attempts: 2},
		{name: "500", rule: answers(500, ""), reason: "RegistryUnavailable", attempts: 2},
		{name: "503", rule: answers(503, ""), reason: "RegistryUnavailable", attempts: 2},
		{name: "429 three times", rule: first(3, answers(429, "")), reason: "Pulled"},
		{name: "503 once", rule: first(1, answers(503, "")), reason: "Pulled"},
		{name: "404 of layers", rule: answers(404, "blob"), reason: "NotFound", attempts: 2},
		{name: "500 of layers", rule: answers(500, "blob"), reason: "RegistryUnavailable", attempts: 2},
		{name: "405 of HEAD", rule: answers(405, "HEAD"), reason: "Pulled", attempts: 1},
		{name: "no digest of tags", rule: withoutDigest, reason: "Pulled", attempts: 1},
		{name: "hangs", rule: hangs, reason: "Timeout", attempts: 2},
		{name: "cuts", rule: cuts, reason: "RegistryUnavailable", attempts: 2},
		{name: "cuts layers", rule: cutsLayers, reason: "Pulled", attempts: 1},
		{name: "password", rule: protected(answers(0, "nothing")), secret: true, reason: "Pulled", attempts: 1},
		{name: "token", rule: token, reason: "Pulled", attempts: 1},
		{name: "layers elsewhere", rule: redirects(signature), reason: "Pulled", attempts: 1},
		{name: "layers elsewhere, password", rule: protected(redirects(signature)), secret: true, reason: "Pulled",
			attempts: 1},
		{name: "layers elsewhere, headers", rule: redirects(signature), hosts: team, reason: "Pulled", attempts: 1},
		{name: "layers elsewhere, expired", rule: redirects(signature + "-old"), reason: "Unauthorized", attempts: 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			pull := func(who string, with func(context.Context, *crooked, pushed) (ok bool)) (*crooked, pushed, bool) {
				n := number.Add(1)
				var lines []string
				if tt.hosts != "" {
					lines = append(lines, tt.hosts)
				}
				c := newCrooked(t, fmt.Sprintf("%s-%d.test", who, n), tt.rule, lines...)
				p := push(t, fmt.Sprintf("matrix-%d:1", n), 2, 1)
				return c, p, with(t.Context(), c, p)
			}
			timeout := waitFor
			if tt.reason == "Timeout" {
				timeout = 500 * time.Millisecond
			}
			judge, _, ok := pull("judge", func(ctx context.Context, c *crooked, p pushed) bool {
				ctx, cancel := context.WithTimeout(ctx, timeout)
				defer cancel()
				req := &runtimeapi.PullImageRequest{Image: spec(c.host + "/" + p.name)}
				if tt.secret {
					req.Auth = &runtimeapi.AuthConfig{Username: "robot", Password: password}
				}
				t.Cleanup(func() {
					_, _ = bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
						&runtimeapi.RemoveImageRequest{Image: req.GetImage()})
				})
				_, err := bed.direct.PullImage(ctx, req)
				t.Logf("containerd: %v", err)
				if tt.again {
					_, err = bed.direct.PullImage(ctx, req)
					must(t, err)
				}
				return err == nil
			})
			if ok != (tt.reason == "Pulled") {
				t.Fatalf("containerd has pulled: %v", ok)
			}
			for name, limit := range map[string]int64{"free": 0, "limited": 30 * mib} {
				c, p, _ := pull(name, func(_ context.Context, c *crooked, p pushed) bool {
					req := &opsv1.PullRequest{Image: c.host + "/" + p.name, BytesPerSecond: limit, MaxAttempts: 2,
						AttemptTimeout: durationpb.New(timeout)}
					if tt.secret {
						req.Credentials = []*opsv1.RegistryCredential{
							{Match: c.host, Username: "robot", Password: password}}
					}
					op := follow(t, begin(t, req), finished)
					if op.GetReason() != tt.reason || tt.attempts != 0 && op.GetAttempt() != tt.attempts {
						t.Errorf("%s: %s after %d attempts, want %s after %d: %v", name, op.GetReason(),
							op.GetAttempt(), tt.reason, tt.attempts, op)
					}
					if tt.again {
						again := clone(req)
						again.Uid, again.Policy = "", opsv1.PullPolicy_PULL_POLICY_ALWAYS
						succeeds(t, begin(t, again))
					}
					if strings.Contains(op.String(), signature) || strings.Contains(op.String(), password) {
						t.Errorf("%s: the operation tells a secret: %v", name, op)
					}
					c.compare(t, name, judge, int(op.GetAttempt()), limit > 0)
					return true
				})
				if tt.reason == "Pulled" && (c.bytes < p.size || c.bytes > p.size+p.size/8) {
					t.Errorf("%s: %d bytes came of an image of %d", name, c.bytes, p.size)
				}
			}
		})
	}
}

// compare checks that this registry was asked no more often, in so many attempts, than the runtime
// alone asks in as many. With a limit we look the tag up before the runtime does, and leave to it
// what does not come here.
func (c *crooked) compare(t *testing.T, name string, judge *crooked, attempts int, limited bool) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	judge.mu.Lock()
	defer judge.mu.Unlock()
	t.Logf("%s: %v in %d attempts, containerd: %v; %d and %d bytes", name, c.asked, attempts, judge.asked,
		c.bytes, judge.bytes)
	for kind, asked := range c.asked {
		once := judge.asked[kind]
		switch {
		case kind == "HEAD tag":
			once = max(once, 1) // whoever had too little time for it
		case judge.bytes == 0 && once > 0 && (kind == "GET blob" || kind == "storage"):
			once = 6 // all three at once, and the first that fails ends the others: each is asked for twice at most
		}
		most := once * attempts
		// the last are for tokens
		if limited && (judge.bytes == 0 || strings.HasSuffix(kind, " tag") || kind == "401" || kind == "GET other") {
			most *= 2
		}
		if once > 0 && (kind == "401" || kind == "GET other") {
			most += 3 * attempts // each of the three blobs, when all are asked for before the first answer
		}
		if asked > most {
			t.Errorf("%s: asked %d times for %s in %d attempts, containerd alone %d times in one", name, asked, kind,
				attempts, once)
		}
	}
	if c.passed != judge.passed {
		t.Errorf("%s: the storage sees %s, and %s of containerd", name, c.passed, judge.passed)
	}
}
