// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// depender says how long calls of Version and Status depend on it; others never do.
type depender struct {
	*director
	version proxy.Dependency
}

func (l *depender) Dependency(method string) proxy.Dependency {
	if method == methodVersion {
		return l.version
	}
	return proxy.Independent
}

func TestHold(t *testing.T) {
	for name, c := range map[string]struct {
		dependency proxy.Dependency
		waits      bool
	}{
		"to the end": {proxy.UntilAnswered, true},
		"at first":   {proxy.UntilForwarded, false},
		"never":      {proxy.Independent, false},
	} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			b := newBed(t, proxy.Options{Director: &depender{&director{}, c.dependency}})
			entered := make(chan struct{}, 8)
			hold := holding(release)
			b.backend.answer(func(method string, s grpc.ServerStream) error {
				entered <- struct{}{}
				return hold(method, s)
			})
			events, call := begin(t, b, methodEvents), begin(t, b, methodVersion)
			<-entered
			<-entered
			ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
			defer cancel()
			held, err := b.server.Hold(ctx)
			if c.waits {
				if !errors.Is(err, context.DeadlineExceeded) ||
					!strings.Contains(err.Error(), "calls under way: Version") {
					t.Fatalf("%v", err)
				}
			} else {
				if err != nil {
					t.Fatal(err)
				}
				// What begins waits, and what is under way goes on.
				later := begin(t, b, methodAlien)
				select {
				case <-later:
					t.Error("a call was answered while calls were held")
				case <-entered:
					t.Error("a call was sent on while calls were held")
				case <-time.After(20 * time.Millisecond):
				}
				held.Release()
				if s := <-later; s.Code != codes.OK {
					t.Errorf("%+v", s)
				}
			}
			close(release)
			if s := <-call; s.Code != codes.OK {
				t.Errorf("%+v", s)
			}
			<-events
		})
	}
}

// Calls that are held go to the other proxy, past the director of this one, and so do those that
// come.
func TestDivert(t *testing.T) {
	asked := make(chan string, 8)
	b := newBed(t, proxy.Options{Director: &director{unary: func(
		ctx context.Context, method string, req []byte, next proxy.UnaryNext,
	) ([]byte, error) {
		asked <- method
		return next(ctx, req)
	}}})
	other := newBed(t, proxy.Options{})
	held, err := b.server.Hold(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	first := begin(t, b, methodVersion)
	to, err := proxy.NewUpstream(other.listen, proxy.UpstreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	held.Divert(to.Conn())
	<-first
	if s := exchange(testContext(t), b.proxied, methodVersion, nil); s.Code != codes.OK {
		t.Errorf("%+v", s)
	}
	if n := other.server.Stats().Calls; n != 2 {
		t.Errorf("%d calls came to the other proxy, want 2", n)
	}
	select {
	case m := <-asked:
		t.Errorf("the director was asked for %s", m)
	default:
	}
}

// Another process that has the listening socket has made it block, as systemd does when it starts
// the next instance.
func TestPauseOfASocketThatBlocks(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	shared, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()
	b := newBed(t, proxy.Options{})
	served := make(chan error, 1)
	go func() { served <- b.server.Serve(l) }()
	untilOK(t, dial(t, l.Addr().String()))
	if err := unix.SetNonblock(int(shared.Fd()), false); err != nil {
		t.Fatal(err)
	}
	untilOK(t, dial(t, l.Addr().String())) // what is accepted next begins while the socket blocks
	if err := b.server.Pause(testContext(t)); err != nil {
		t.Error(err)
	}
	b.server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A paused server leaves connections in the queue, and takes them when it goes on.
func TestPause(t *testing.T) {
	b := newBed(t, proxy.Options{})
	untilOK(t, b.proxied)
	if err := b.server.Pause(testContext(t)); err != nil {
		t.Fatal(err)
	}
	fresh := dial(t, b.listen)
	answered := make(chan *seen, 1)
	ctx := testContext(t)
	go func() { s, _ := invoke(ctx, fresh, methodVersion, nil); answered <- s }()
	if s, _ := invoke(ctx, b.proxied, methodVersion, nil); s.Code != codes.OK {
		t.Errorf("an old connection: %+v", s)
	}
	select {
	case s := <-answered:
		t.Errorf("answered while paused: %+v", s)
	case <-time.After(20 * time.Millisecond):
	}
	b.server.Resume()
	if s := <-answered; s.Code != codes.OK {
		t.Errorf("%+v", s)
	}
}

// What comes after a pause is another process's, which has the socket, too: a server that ends
// while it is paused takes nothing of it.
func TestEndAfterPause(t *testing.T) {
	up, err := proxy.NewUpstream(filepath.Join(t.TempDir(), "none"), proxy.UpstreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	for range 200 {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		other, err := net.FileListener(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		s := proxy.NewServer(up, proxy.Options{})
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		before, err := net.Dial("unix", l.Addr().String()) // says nothing, which does not keep the server from its end
		if err != nil {
			t.Fatal(err)
		}
		if _, err := before.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if err := s.Pause(testContext(t)); err != nil {
			t.Fatal(err)
		}
		after, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		_ = other.(*net.UnixListener).SetDeadline(time.Now().Add(waitLong))
		taken := make(chan struct{})
		go func() { // ends with the connection
			if _, err := after.Read(make([]byte, 1)); err != nil {
				_ = other.Close()
			}
			close(taken)
		}()
		c, err := other.Accept()
		if err != nil {
			t.Fatalf("the server has taken it: %v", err)
		}
		_ = errors.Join(c.Close(), before.Close())
		<-taken
		_ = errors.Join(after.Close(), other.Close())
	}
}
