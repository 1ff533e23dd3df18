// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// awaitInFlight waits until n calls are in flight.
func awaitInFlight(t *testing.T, s *proxy.Server, n uint64) {
	t.Helper()
	for end := time.Now().Add(waitLong); s.Stats().InFlight != n; runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%d calls in flight, want %d", s.Stats().InFlight, n)
		}
	}
}

// holding is a runtime that sends one message on every call but Version, then
// holds it until released. methodAlien answers at once.
func holding(release <-chan struct{}) func(string, grpc.ServerStream) error {
	return func(method string, s grpc.ServerStream) error {
		m := []byte("held")
		if method == methodAlien {
			return nil
		}
		if method != methodVersion {
			_ = s.SendMsg(&m)
		}
		select {
		case <-release:
		case <-s.Context().Done():
			return s.Context().Err()
		}
		if method == methodVersion {
			return s.SendMsg(&m)
		}
		return nil
	}
}

// begin makes a call that does not end by itself, and returns when it has come to the proxy.
func begin(t *testing.T, b *bed, method string) <-chan *seen {
	t.Helper()
	before := b.server.Stats().InFlight
	over := make(chan *seen, 1)
	ctx := testContext(t)
	go func() { over <- exchange(ctx, b.proxied, method, nil) }()
	awaitInFlight(t, b.server, before+1)
	return over
}

func TestDrainWaitsForCallsAndEndsEventStreams(t *testing.T) {
	// A list that streams and a method of unknown kind are waited for, too: they
	// may be about to end.
	for _, finite := range []string{methodVersion, methodList, methodNew} {
		t.Run(finite, func(t *testing.T) {
			release := make(chan struct{})
			b := newBed(t, proxy.Options{})
			b.backend.answer(holding(release))
			events, call := begin(t, b, methodEvents), begin(t, b, finite)
			drained := make(chan error, 1)
			ctx := testContext(t)
			go func() { drained <- b.server.Drain(ctx) }()
			// Closed to newcomers: the listener is gone, and the client goes away
			// from the connection that it has.
			for exchange(ctx, b.proxied, methodAlien, nil).Code != codes.Unavailable {
				if ctx.Err() != nil {
					t.Fatal("newcomers are served on")
				}
			}
			select {
			case s := <-events:
				t.Fatalf("event stream ended while a call was in flight: %+v", s)
			case err := <-drained:
				t.Fatalf("drained with a call in flight: %v", err)
			default:
			}
			close(release)
			if s := <-call; s.Code != codes.OK || len(s.Events) != 1 {
				t.Errorf("call in flight: %+v", s)
			}
			<-events // by the release or by the drain
			if err := <-drained; err != nil {
				t.Errorf("Drain: %v", err)
			}
		})
	}
}

func TestDrainEndsEventStreamsWhenOnlyTheyRemain(t *testing.T) {
	b := newBed(t, proxy.Options{})
	b.backend.answer(holding(nil))
	first, second := begin(t, b, methodEvents), begin(t, b, methodEvents)
	if err := b.server.Drain(testContext(t)); err != nil {
		t.Errorf("Drain: %v", err)
	}
	for _, s := range []*seen{<-first, <-second} {
		if s.Code != codes.Unavailable || !strings.Contains(s.Message, "cri-proxy is stopping") {
			t.Errorf("%+v", s)
		}
	}
}

// A method of unknown kind that has answered more than once is a stream.
func TestDrainEndsUnknownStream(t *testing.T) {
	b := newBed(t, proxy.Options{})
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		_ = s.SendMsg(new([]byte))
		_ = s.SendMsg(new([]byte))
		<-s.Context().Done()
		return nil
	})
	stream, err := b.proxied.NewStream(testContext(t), &anyStream, methodNew)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stream.RecvMsg(new([]byte)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.server.Drain(testContext(t)); err != nil {
		t.Errorf("Drain: %v", err)
	}
	var s seen
	if s.read(stream); s.Code != codes.Unavailable {
		t.Errorf("%+v", s)
	}
}

func TestDrainOutOfTime(t *testing.T) {
	b := newBed(t, proxy.Options{})
	entered, hold := make(chan struct{}, 2), holding(nil)
	b.backend.answer(func(method string, s grpc.ServerStream) error {
		entered <- struct{}{}
		return hold(method, s)
	})
	events, call := begin(t, b, methodEvents), begin(t, b, methodVersion)
	<-entered // by then the proxy knows what will not end by itself
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := b.server.Drain(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 calls cut") {
		t.Errorf("Drain: %v", err)
	}
	if s := <-events; s.Code != codes.Unavailable {
		t.Errorf("event stream: %+v", s)
	}
	if s := <-call; s.Code != codes.Unavailable {
		t.Errorf("call: %+v", s)
	}
}

// An interceptor that works on, detached, cannot hold up a drain for longer than
// the drain's own limit.
func TestDrainDoesNotWaitForDetachedWork(t *testing.T) {
	began, release, returned := make(chan struct{}), make(chan struct{}), make(chan struct{})
	b := newBed(t, proxy.Options{Director: &director{unary: func(
		context.Context, string, []byte, proxy.UnaryNext,
	) ([]byte, error) {
		defer close(returned)
		close(began)
		<-release
		return nil, nil
	}}})
	call := begin(t, b, methodVersion)
	<-began
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.server.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain: %v", err)
	}
	if s := <-call; s.Code != codes.Unavailable {
		t.Errorf("%+v", s)
	}
	close(release)
	<-returned
}

// A client that does not read its event stream cannot hold up the drain.
func TestDrainCutsClientThatDoesNotRead(t *testing.T) {
	b := newBed(t, proxy.Options{})
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		m := make([]byte, 1<<20)
		for s.SendMsg(&m) == nil {
		}
		return nil
	})
	stream, err := b.proxied.NewStream(testContext(t), &anyStream, methodEvents)
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.SendMsg(new([]byte))
	_ = stream.CloseSend()
	if err := stream.RecvMsg(new([]byte)); err != nil {
		t.Fatal(err)
	}
	if err := b.server.Drain(testContext(t)); err != nil {
		t.Errorf("Drain: %v", err)
	}
}

func TestDrainIdle(t *testing.T) {
	b := newBed(t, proxy.Options{})
	untilOK(t, b.proxied)
	if err := b.server.Drain(testContext(t)); err != nil {
		t.Errorf("Drain: %v", err)
	}
	if err := <-b.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	b.served <- nil // for the cleanup
	if err := b.server.Drain(testContext(t)); err != nil {
		t.Errorf("second Drain: %v", err)
	}
}

// A new instance that has taken the path over before the old one drains: no
// call fails.
func TestTakeoverWithoutFailedCalls(t *testing.T) {
	b := newBed(t, proxy.Options{})
	ctx := testContext(t)
	stop, failed := make(chan struct{}), make(chan string, 1)
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if s, _ := invoke(ctx, b.proxied, methodVersion, nil); s.Code != codes.OK {
				failed <- s.Message
				return
			}
		}
	}()
	untilOK(t, b.proxied)
	old := b.listen + ".old" // as if a symlink or a socket unit: the path never goes
	next := proxy.NewServer(b.upstream, proxy.Options{})
	l, err := proxy.Listen(old, proxy.ListenOptions{UID: -1, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- next.Serve(l) }()
	defer func() { next.Stop(); <-served }()
	rename(t, old, b.listen)
	if err := b.server.Drain(ctx); err != nil {
		t.Errorf("Drain: %v", err)
	}
	calls := next.Stats().Calls
	for next.Stats().Calls < calls+10 && ctx.Err() == nil {
		runtime.Gosched()
	}
	close(stop)
	if message, ok := <-failed; ok {
		t.Errorf("a call failed: %s", message)
	}
}
