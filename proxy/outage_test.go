// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// recovery bounds how long calls may fail after the runtime is back: the longest
// back-off with its jitter, and room for a loaded machine under the race detector.
const recovery = 240*time.Millisecond + time.Second

// soon asserts that what f measures is within recovery. A proxy that waits too long does so every
// time; a machine that has too much to do does not.
func soon(t *testing.T, what string, f func() time.Duration) {
	t.Helper()
	var took []time.Duration
	for range 10 {
		d := f()
		if d <= recovery {
			return
		}
		took = append(took, d)
	}
	t.Errorf("%s took %v", what, took)
}

// untilOK calls until an answer comes and returns how long that took.
func untilOK(t *testing.T, conn *grpc.ClientConn) time.Duration {
	t.Helper()
	began, ctx := time.Now(), testContext(t)
	for {
		s, _ := invoke(ctx, conn, methodVersion, nil)
		switch {
		case s.Code == codes.OK:
			return time.Since(began)
		case s.Code != codes.Unavailable:
			t.Fatalf("%v %s", s.Code, s.Message)
		}
	}
}

// awaitState waits until the upstream connection is in the state.
func awaitState(t *testing.T, u *proxy.Upstream, want connectivity.State) {
	t.Helper()
	ctx := testContext(t)
	for {
		state := u.State()
		if state == want {
			return
		}
		if !u.Conn().WaitForStateChange(ctx, state) {
			t.Fatalf("the upstream stays %v", state)
		}
	}
}

func TestRuntimeDiesDuringCalls(t *testing.T) {
	b := newBed(t, proxy.Options{})
	eachKind(t, func(t *testing.T, method string) {
		soon(t, "finding the runtime again", func() time.Duration {
			untilOK(t, b.proxied)
			began := make(chan struct{})
			b.backend.answer(func(_ string, s grpc.ServerStream) error {
				if method != methodVersion {
					_ = s.SendMsg(new([]byte))
				}
				close(began)
				<-s.Context().Done()
				return nil
			})
			stream, err := b.proxied.NewStream(testContext(t), &anyStream, method)
			if err != nil {
				t.Fatal(err)
			}
			_ = stream.SendMsg(new([]byte))
			_ = stream.CloseSend()
			<-began
			if method != methodVersion {
				if err := stream.RecvMsg(new([]byte)); err != nil {
					t.Fatal(err)
				}
			}
			b.backend.stop()
			var s seen
			if s.read(stream); s.Code != codes.Unavailable {
				t.Errorf("in flight: %v %s", s.Code, s.Message)
			}
			if s := exchange(testContext(t), b.proxied, method, nil); s.Code != codes.Unavailable {
				t.Errorf("while away: %v %s", s.Code, s.Message)
			}
			b.backend.answer(echo)
			b.backend.start(t)
			return untilOK(t, b.proxied)
		})
	})
}

// An outage of any length ends as quickly.
func TestRuntimeReturnsAfterLongOutage(t *testing.T) {
	b := newBed(t, proxy.Options{})
	soon(t, "the return", func() time.Duration {
		untilOK(t, b.proxied)
		b.backend.stop()
		// Something else listens meanwhile and hangs up, which counts the tries.
		l, err := net.Listen("unix", b.backend.path)
		if err != nil {
			t.Fatal(err)
		}
		try := func() time.Time {
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			return time.Now()
		}
		var last time.Time
		for range 11 { // by then the back-off is at its longest
			last = try()
		}
		soon(t, "the next try", func() time.Duration {
			before := last
			last = try()
			return last.Sub(before)
		})
		l.Close()
		b.backend.start(t)
		return untilOK(t, b.proxied)
	})
}

func TestRuntimeNotThereAtStart(t *testing.T) {
	for _, tc := range []struct{ name, path string }{
		{"socket missing", "runtime.sock"},
		{"directory missing", "run/containerd/runtime.sock"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, tc.path)
			u, err := proxy.NewUpstream(path, proxy.UpstreamOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			if want := "unix://" + path; u.Endpoint() != want {
				t.Errorf("endpoint %s", u.Endpoint())
			}
			s, _ := invoke(testContext(t), u.Conn(), methodVersion, nil, grpc.ForceCodecV2(bytesCodec{}))
			if s.Code != codes.Unavailable || !strings.Contains(s.Message, path) {
				t.Errorf("%v %s", s.Code, s.Message)
			}
			// The directory goes and comes while the proxy watches it.
			for range 3 {
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				backend := &backend{path: path}
				backend.answer(echo)
				backend.start(t)
				awaitState(t, u, connectivity.Ready)
				backend.stop()
				awaitState(t, u, connectivity.TransientFailure)
				if filepath.Dir(path) != dir {
					if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

func TestUpstreamEndpoint(t *testing.T) {
	for endpoint, ok := range map[string]bool{
		"/run/x.sock": true, "unix:///run/x.sock": true, "unix:/run/x.sock": true,
		"": false, "run/x.sock": false, "unix://run/x.sock": false, "tcp://127.0.0.1:1": false,
		"npipe:////./pipe/x": false,
	} {
		u, err := proxy.NewUpstream(endpoint, proxy.UpstreamOptions{})
		if (err == nil) != ok {
			t.Errorf("%q: %v", endpoint, err)
		}
		if err == nil {
			if u.Endpoint() != "unix:///run/x.sock" {
				t.Errorf("%q became %q", endpoint, u.Endpoint())
			}
			u.Close()
		}
	}
}

// Closing the connection to the runtime is not something the caller cancelled.
func TestUpstreamClosedUnderCall(t *testing.T) {
	eachKind(t, func(t *testing.T, method string) {
		b := newBed(t, proxy.Options{})
		began := make(chan struct{})
		b.backend.answer(func(_ string, s grpc.ServerStream) error {
			close(began)
			<-s.Context().Done()
			return nil
		})
		over := make(chan *seen)
		go func() { over <- exchange(context.Background(), b.proxied, method, nil) }()
		<-began
		b.upstream.Conn().Close()
		if s := <-over; s.Code != codes.Unavailable {
			t.Errorf("in flight: %v %s", s.Code, s.Message)
		}
		if s := exchange(testContext(t), b.proxied, method, nil); s.Code != codes.Unavailable {
			t.Errorf("afterwards: %v %s", s.Code, s.Message)
		}
	})
}
