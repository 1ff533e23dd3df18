// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"google.golang.org/grpc"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// watched is a node that serves, with a watchdog that systemd, which is the test, has set.
type watched struct {
	*node
	systemd *net.UnixConn
	hook    *logtest.Hook
}

func startWatched(t *testing.T) *watched {
	t.Helper()
	path, conn := notifySocket(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "1500000") // long enough for a runtime that hangs to be given up
	t.Setenv("WATCHDOG_PID", "")
	c := newConfig(t)
	if err := os.MkdirAll(filepath.Dir(c.Listen.Path), 0o700); err != nil {
		t.Fatal(err)
	}
	log, hook := logtest.NewNullLogger()
	n, err := newNode(c, c.Listen.Path, log)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.openState(t.Context(), view.State{}); err != nil {
		t.Fatal(errors.Join(err, n.close()))
	}
	l, err := listenCRI(c)
	if err != nil {
		t.Fatal(errors.Join(err, n.close()))
	}
	d := &daemon{node: n, log: log, notify: notifier{log: log}}
	ctx, cancel := context.WithCancel(context.Background())
	var owned sync.WaitGroup
	owned.Go(func() { _ = n.cri.Serve(l) })
	owned.Go(func() { d.notify.watchdog(ctx, d.alive) })
	t.Cleanup(func() {
		cancel()
		n.cri.Stop()
		owned.Wait()
		if err := n.close(); err != nil {
			t.Error(err)
		}
	})
	return &watched{node: n, systemd: conn, hook: hook}
}

// pings waits for some.
func (w *watched) pings(t *testing.T, n int) {
	t.Helper()
	for range n {
		if state := notified(t, w.systemd); state["WATCHDOG"] != "1" {
			t.Fatalf("got %v", state)
		}
	}
}

// missed waits until that many probes have had no answer.
func (w *watched) missed(t *testing.T, n int) {
	t.Helper()
	for until := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
		have := 0
		for _, e := range w.hook.AllEntries() {
			if e.Message == "no watchdog ping" {
				have++
			}
		}
		if have >= n {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("%d of %d probes have failed", have, n)
		}
	}
}

// drain throws away what has been said so far and returns how many pings were among it.
func (w *watched) drain(t *testing.T) (pings int) {
	t.Helper()
	buf := make([]byte, 4096)
	for {
		if err := w.systemd.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := w.systemd.Read(buf)
		if err != nil {
			return pings
		}
		if string(buf[:n]) == "WATCHDOG=1" {
			pings++
		}
	}
}

// lockOf is the lock of the view, which nothing outside of it holds for longer than a look takes.
func lockOf(v *view.View) *sync.RWMutex {
	field := reflect.ValueOf(v).Elem().FieldByName("mu")
	return (*sync.RWMutex)(unsafe.Pointer(field.UnsafeAddr())) //nolint:gosec // a hang is what is tested
}

// blocked is a director that does not decide until it is let go.
type blocked struct {
	*interceptors.Director
	until chan struct{}
}

func (b *blocked) Unary(method string) proxy.UnaryInterceptor {
	<-b.until
	return b.Director.Unary(method)
}

// TestWatchdogSeesAHang makes every part on the way of a kubelet's call hang: systemd must hear
// nothing until it goes on.
func TestWatchdogSeesAHang(t *testing.T) {
	hide := func(t *testing.T, w *watched) {
		t.Helper()
		claim, err := w.state.Load().view.TryClaim(view.Slot{PodUID: "u", Container: "c"})
		if err != nil {
			t.Fatal(err)
		}
		claim.HideNow("token")
		t.Cleanup(claim.Release)
	}
	lock := func(_ *testing.T, w *watched) (letGo func()) {
		mu := lockOf(w.state.Load().view)
		mu.Lock()
		return mu.Unlock
	}
	for _, tc := range []struct {
		name string
		hang func(t *testing.T, w *watched) (letGo func())
	}{
		{"the lock of the view", lock},
		{"the lock of the view while something is hidden", func(t *testing.T, w *watched) func() {
			hide(t, w)
			return lock(t, w)
		}},
		{"the director", func(_ *testing.T, w *watched) func() {
			st := w.state.Load()
			d := interceptors.New(interceptors.Options{
				View: st.view, Records: st.engine.Records(), Runtime: w.upstream.Conn(), Log: logrus.New(),
			})
			b := &blocked{Director: d, until: make(chan struct{})}
			w.cri.SetDirector(b)
			return func() { close(b.until) }
		}},
		{"the handler", func(t *testing.T, w *watched) func() {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			h, err := w.cri.Hold(ctx)
			if err != nil {
				t.Fatal(err)
			}
			return h.Release
		}},
		{"accepting", func(t *testing.T, w *watched) func() {
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if err := w.cri.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			return w.cri.Resume
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := startWatched(t)
			w.pings(t, 1)
			letGo := sync.OnceFunc(tc.hang(t, w))
			defer letGo()
			w.missed(t, 1)
			w.drain(t) // from before
			w.missed(t, 3)
			if n := w.drain(t); n > 0 {
				t.Errorf("systemd has had %d pings", n)
			}
			letGo()
			w.pings(t, 1)
		})
	}
}

// TestWatchdogDoesNotMindTheRuntime: no restart of the proxy makes a runtime answer.
func TestWatchdogDoesNotMindTheRuntime(t *testing.T) {
	for _, tc := range []struct {
		name    string
		runtime func(t *testing.T, path string)
	}{
		{"absent", func(*testing.T, string) {}},
		{"there", func(t *testing.T, path string) { startRuntime(t, path) }},
		{"accepts and says nothing", func(t *testing.T, path string) {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}},
		{"answers no call", func(t *testing.T, path string) {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			silent := func(_ any, s grpc.ServerStream) error {
				<-s.Context().Done()
				return s.Context().Err()
			}
			s := grpc.NewServer(grpc.WaitForHandlers(true), grpc.UnknownServiceHandler(silent))
			var owned sync.WaitGroup
			owned.Go(func() { _ = s.Serve(l) })
			t.Cleanup(func() {
				s.Stop()
				owned.Wait()
			})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := startWatched(t)
			tc.runtime(t, runtimePath(w.config))
			w.pings(t, 3)
			st := w.cri.Stats()
			if st.Calls+st.Intercepted+st.CallErrors != 0 || !st.LastCall.IsZero() || st.LastUserAgent != "" {
				t.Errorf("the probe counts as a call: %+v", st)
			}
		})
	}
}
