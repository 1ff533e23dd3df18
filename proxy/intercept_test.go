// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// director has one interceptor of each kind for every method.
type director struct {
	unary  proxy.UnaryInterceptor
	stream proxy.StreamInterceptor
	ask    func(method string)
}

func (d *director) Unary(method string) proxy.UnaryInterceptor {
	if d.ask != nil {
		d.ask(method)
	}
	return d.unary
}

func (d *director) Stream(method string) proxy.StreamInterceptor {
	if d.ask != nil {
		d.ask(method)
	}
	return d.stream
}

// answering is a runtime that tells what it was asked and shows its metadata.
func answering(_ string, s grpc.ServerStream) error {
	var m []byte
	if err := s.RecvMsg(&m); err != nil {
		return err
	}
	in, _ := metadata.FromIncomingContext(s.Context())
	_ = s.SetHeader(metadata.Pairs("runtime-header", string(m), "saw", strings.Join(in["caller"], ",")))
	s.SetTrailer(metadata.Pairs("runtime-trailer", string(m)))
	if string(m) == "fail" {
		return status.Error(codes.NotFound, "no such container")
	}
	m = append([]byte("runtime says "), m...)
	return s.SendMsg(&m)
}

func TestUnaryInterceptor(t *testing.T) {
	pass := &proxy.PassError{Err: errors.New("bytes do not decode")}
	for _, tc := range []struct {
		name   string
		take   proxy.UnaryInterceptor
		req    string
		want   string // answer or status message
		code   codes.Code
		asked  []string // what reaches the runtime
		faults uint64
	}{
		{name: "forwards", take: func(ctx context.Context, _ string, req []byte, next proxy.UnaryNext) ([]byte, error) {
			return next(ctx, req)
		}, want: "runtime says hello", asked: []string{"hello"}},
		{name: "changes the request", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			return next(ctx, append([]byte("changed "), req...))
		}, want: "runtime says changed hello", asked: []string{"changed hello"}},
		{name: "changes the answer", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			resp, err := next(ctx, req)
			return append(resp, '!'), err
		}, want: "runtime says hello!", asked: []string{"hello"}},
		{name: "answers itself", take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
			return []byte("mine"), nil
		}, want: "mine"},
		{name: "empty answer", take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
			return nil, nil
		}, want: ""},
		{name: "a status of its own", take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
			return nil, status.Error(codes.NotFound, "hidden")
		}, want: "hidden", code: codes.NotFound},
		{name: "asks several times", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			_, _ = next(ctx, []byte("first"))
			return next(ctx, []byte("second"))
		}, want: "runtime says second", asked: []string{"first", "second"}},
		{name: "runtime's error", req: "fail", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			return next(ctx, req)
		}, want: "no such container", code: codes.NotFound, asked: []string{"fail"}},
		{name: "runtime's error wrapped", req: "fail", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			_, err := next(ctx, req)
			return nil, fmt.Errorf("asked the runtime: %w", err)
		}, want: "no such container", code: codes.NotFound, asked: []string{"fail"}},
		{name: "detached from the caller", take: func(
			_ context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			return next(context.Background(), req)
		}, want: "runtime says hello", asked: []string{"hello"}},

		{name: "passes before next", take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
			return nil, pass
		}, want: "runtime says hello", asked: []string{"hello"}, faults: 1},
		{name: "passes after next", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			_, _ = next(ctx, []byte("changed"))
			return []byte("ignored"), fmt.Errorf("wrapped: %w", pass)
		}, want: "runtime says changed", asked: []string{"changed"}, faults: 1},
		{name: "passes after next failed", req: "fail", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			_, _ = next(ctx, req)
			return nil, pass
		}, want: "no such container", code: codes.NotFound, asked: []string{"fail"}, faults: 1},
		{name: "an error that is no status",
			take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
				return nil, errors.New("bug")
			}, want: "runtime says hello", asked: []string{"hello"}, faults: 1},
		{name: "a context error of its own",
			take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
				return nil, context.DeadlineExceeded
			}, want: "runtime says hello", asked: []string{"hello"}, faults: 1},
		{name: "panics before next", take: func(context.Context, string, []byte, proxy.UnaryNext) ([]byte, error) {
			panic("bug")
		}, want: "runtime says hello", asked: []string{"hello"}, faults: 1},
		{name: "panics after next", take: func(
			ctx context.Context, _ string, req []byte, next proxy.UnaryNext,
		) ([]byte, error) {
			_, _ = next(ctx, req)
			panic("bug")
		}, want: "runtime says hello", asked: []string{"hello"}, faults: 1},
		{name: "none", want: "runtime says hello", asked: []string{"hello"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			registry := prometheus.NewPedanticRegistry()
			b := newBed(t, proxy.Options{Director: &director{unary: tc.take}, Registerer: registry})
			var asked []string
			b.backend.answer(func(method string, s grpc.ServerStream) error {
				return answering(method, tap{s, func(m []byte) { asked = append(asked, string(m)) }})
			})
			if tc.req == "" {
				tc.req = "hello"
			}
			ctx := metadata.AppendToOutgoingContext(testContext(t), "caller", "me")
			s, resp := invoke(ctx, b.proxied, methodVersion, []byte(tc.req))
			got := string(resp)
			if tc.code != codes.OK {
				got = s.Message
			}
			if got != tc.want || s.Code != tc.code {
				t.Errorf("answer %v %q, want %v %q", s.Code, got, tc.code, tc.want)
			}
			if !slices.Equal(asked, tc.asked) {
				t.Errorf("the runtime was asked %q, want %q", asked, tc.asked)
			}
			// Header and trailer are those of the last time the runtime was asked.
			var header, trailer, saw []string
			if n := len(tc.asked); n > 0 {
				header, trailer, saw = tc.asked[n-1:], tc.asked[n-1:], []string{"me"}
			}
			if !slices.Equal(s.Header["runtime-header"], header) ||
				!slices.Equal(s.Trailer["runtime-trailer"], trailer) || !slices.Equal(s.Header["saw"], saw) {
				t.Errorf("header %v trailer %v", s.Header, s.Trailer)
			}
			st := b.server.Stats()
			if st.InterceptorFaults != tc.faults || (st.Intercepted == 1) != (tc.take != nil) || st.Calls != 1 {
				t.Errorf("stats %+v, want %d faults", st, tc.faults)
			}
			want := ""
			if tc.faults > 0 {
				want = "# HELP criproxy_interceptor_faults_total " +
					"Interceptor errors and panics after which a call was passed through unchanged.\n" +
					"# TYPE criproxy_interceptor_faults_total counter\n" +
					`criproxy_interceptor_faults_total{method="` + methodVersion + `"} 1` + "\n"
			}
			const faults = "criproxy_interceptor_faults_total"
			if err := testutil.GatherAndCompare(registry, strings.NewReader(want), faults); err != nil {
				t.Error(err)
			}
		})
	}
}

// tap shows a handler's requests.
type tap struct {
	grpc.ServerStream
	see func([]byte)
}

func (t tap) RecvMsg(m any) error {
	err := t.ServerStream.RecvMsg(m)
	if err == nil {
		t.see(*m.(*[]byte))
	}
	return err
}

// A director that panics is not there.
func TestDirectorPanics(t *testing.T) {
	b := newBed(t, proxy.Options{Director: &director{ask: func(string) { panic("bug") }}})
	eachKind(t, func(t *testing.T, method string) {
		if s := exchange(testContext(t), b.proxied, method, []byte("x")); s.Code != codes.OK || len(s.Events) != 1 {
			t.Errorf("%+v", s)
		}
	})
	if n := b.server.Stats().InterceptorFaults; n != 3 { // methods of unknown kind are not asked about
		t.Errorf("%d faults", n)
	}
}

// A caller that leaves while its interceptor waits.
func TestInterceptedCallerGivesUp(t *testing.T) {
	waiting := make(chan struct{})
	b := newBed(t, proxy.Options{Director: &director{unary: func(
		ctx context.Context, _ string, _ []byte, _ proxy.UnaryNext,
	) ([]byte, error) {
		close(waiting)
		<-ctx.Done()
		return nil, ctx.Err()
	}}})
	ctx, cancel := context.WithCancel(testContext(t))
	go func() { <-waiting; cancel() }()
	if s, _ := invoke(ctx, b.proxied, methodVersion, nil); s.Code != codes.Canceled {
		t.Errorf("%v %s", s.Code, s.Message)
	}
	awaitInFlight(t, b.server, 0)
	if n := b.server.Stats().InterceptorFaults; n != 0 {
		t.Errorf("%d faults", n)
	}
}

// filter is a StreamFilter made of functions.
type filter struct {
	message func([]byte) ([][]byte, error)
	extra   chan []byte
	closed  chan struct{}
}

func (f *filter) Message(m []byte) ([][]byte, error) {
	if f.message == nil {
		return [][]byte{m}, nil
	}
	return f.message(m)
}
func (f *filter) Extra() <-chan []byte { return f.extra }
func (f *filter) Close()               { close(f.closed) } // panics when called twice

func TestStreamInterceptor(t *testing.T) {
	for _, tc := range []struct {
		name   string
		take   func(f *filter) proxy.StreamInterceptor // nil: returns f and the request
		filter func(m []byte) ([][]byte, error)
		want   []string
		code   codes.Code
		faults uint64
		unused bool // the filter is never put to work
	}{
		{name: "passes all", want: []string{"hello", "1", "2", "3"}},
		{name: "drops", filter: func(m []byte) ([][]byte, error) {
			if string(m) == "2" {
				return nil, nil
			}
			return [][]byte{m}, nil
		}, want: []string{"hello", "1", "3"}},
		{name: "adds and changes", filter: func(m []byte) ([][]byte, error) {
			return [][]byte{m, append(slices.Clone(m), '+')}, nil
		}, want: []string{"hello", "hello+", "1", "1+", "2", "2+", "3", "3+"}},
		{name: "changes the request", take: func(f *filter) proxy.StreamInterceptor {
			return func(context.Context, string, []byte) ([]byte, proxy.StreamFilter, error) {
				return []byte("other"), f, nil
			}
		}, want: []string{"other", "1", "2", "3"}},
		{name: "no filter", take: func(*filter) proxy.StreamInterceptor {
			return func(_ context.Context, _ string, req []byte) ([]byte, proxy.StreamFilter, error) {
				return req, nil, nil
			}
		}, want: []string{"hello", "1", "2", "3"}, unused: true},
		{name: "a status of its own", take: func(*filter) proxy.StreamInterceptor {
			return func(context.Context, string, []byte) ([]byte, proxy.StreamFilter, error) {
				return nil, nil, status.Error(codes.NotFound, "hidden")
			}
		}, code: codes.NotFound, unused: true},
		{name: "passes", take: func(*filter) proxy.StreamInterceptor {
			return func(context.Context, string, []byte) ([]byte, proxy.StreamFilter, error) {
				return nil, nil, &proxy.PassError{Err: errors.New("bytes do not decode")}
			}
		}, want: []string{"hello", "1", "2", "3"}, faults: 1, unused: true},
		{name: "panics", take: func(*filter) proxy.StreamInterceptor {
			return func(context.Context, string, []byte) ([]byte, proxy.StreamFilter, error) { panic("bug") }
		}, want: []string{"hello", "1", "2", "3"}, faults: 1, unused: true},
		{name: "filter fails", filter: func(m []byte) ([][]byte, error) {
			return nil, errors.New("bug")
		}, want: []string{"hello", "1", "2", "3"}, faults: 4},
		{name: "filter panics", filter: func(m []byte) ([][]byte, error) {
			if string(m) == "2" {
				panic("bug")
			}
			return [][]byte{m}, nil
		}, want: []string{"hello", "1", "2", "3"}, faults: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &filter{message: tc.filter, closed: make(chan struct{})}
			var take proxy.StreamInterceptor = func(
				_ context.Context, _ string, req []byte,
			) ([]byte, proxy.StreamFilter, error) {
				return req, f, nil
			}
			if tc.take != nil {
				take = tc.take(f)
			}
			b := newBed(t, proxy.Options{Director: &director{stream: take}})
			b.backend.answer(func(_ string, s grpc.ServerStream) error {
				_ = s.SetHeader(metadata.Pairs("h", "1"))
				var m []byte
				_ = s.RecvMsg(&m)
				for _, m := range []string{string(m), "1", "2", "3"} {
					b := []byte(m)
					_ = s.SendMsg(&b)
				}
				s.SetTrailer(metadata.Pairs("t", "1"))
				return nil
			})
			s := exchange(testContext(t), b.proxied, methodList, []byte("hello"))
			var want []string
			for _, m := range tc.want {
				want = append(want, fmt.Sprintf("message %q", m))
			}
			if !slices.Equal(s.Events, want) || s.Code != tc.code {
				t.Errorf("got %v %v, want %v %v", s.Events, s.Code, want, tc.code)
			}
			if tc.code == codes.OK && (len(s.Header["h"]) != 1 || len(s.Trailer["t"]) != 1) {
				t.Errorf("header %v trailer %v", s.Header, s.Trailer)
			}
			awaitInFlight(t, b.server, 0)
			select {
			case <-f.closed:
				if tc.unused {
					t.Error("a filter that was not used is closed")
				}
			default:
				if !tc.unused {
					t.Error("the filter is not closed")
				}
			}
			if st := b.server.Stats(); st.InterceptorFaults != tc.faults || st.Intercepted != 1 {
				t.Errorf("stats %+v", st)
			}
		})
	}
}

// Messages out of turn come through while the runtime is silent, between its
// messages and right before the end.
func TestStreamExtra(t *testing.T) {
	f := &filter{extra: make(chan []byte, 10), closed: make(chan struct{})}
	b := newBed(t, proxy.Options{Director: &director{stream: func(
		_ context.Context, _ string, req []byte,
	) ([]byte, proxy.StreamFilter, error) {
		return req, f, nil
	}}})
	say := make(chan string)
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		for m := range say {
			b := []byte(m)
			_ = s.SendMsg(&b)
		}
		return status.Error(codes.Aborted, "over")
	})
	stream, err := b.proxied.NewStream(testContext(t), &anyStream, methodEvents)
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.SendMsg(new([]byte))
	_ = stream.CloseSend()
	expect := func(want string) {
		t.Helper()
		var m []byte
		if err := stream.RecvMsg(&m); err != nil || string(m) != want {
			t.Fatalf("got %q, %v, want %q", m, err, want)
		}
	}
	f.extra <- []byte("x1") // before the runtime has sent so much as a header
	expect("x1")
	say <- "r1"
	expect("r1")
	f.extra <- []byte("x2")
	f.extra <- []byte("x3")
	expect("x2")
	expect("x3")
	say <- "r2"
	expect("r2")
	close(f.extra) // a filter may do that; it means never again
	say <- "r3"
	expect("r3")
	close(say)
	if err := stream.RecvMsg(new([]byte)); status.Code(err) != codes.Aborted {
		t.Error(err)
	}
	<-f.closed
}

// The end of a filtered stream comes from either side.
func TestFilteredStreamEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(b *bed, cancel func())
		code codes.Code
	}{
		{"caller leaves", func(_ *bed, cancel func()) { cancel() }, codes.Canceled},
		{"runtime dies", func(b *bed, _ func()) { b.backend.stop() }, codes.Unavailable},
		{"proxy stops", func(b *bed, _ func()) { b.server.Stop() }, codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &filter{closed: make(chan struct{})}
			b := newBed(t, proxy.Options{Director: &director{stream: func(
				_ context.Context, _ string, req []byte,
			) ([]byte, proxy.StreamFilter, error) {
				return req, f, nil
			}}})
			began := make(chan struct{})
			b.backend.answer(func(_ string, s grpc.ServerStream) error {
				close(began)
				<-s.Context().Done()
				return nil
			})
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			over := make(chan *seen)
			go func() { over <- exchange(ctx, b.proxied, methodEvents, nil) }()
			<-began
			tc.end(b, cancel)
			if s := <-over; s.Code != tc.code {
				t.Errorf("%v %s", s.Code, s.Message)
			}
			<-f.closed
		})
	}
}

// strange is a director that is asked for methods that are not known.
type strange struct {
	*director
	pass func(ctx context.Context, method string, cut func()) (done func(), ok bool)
}

func (s *strange) PassUnknown(ctx context.Context, method string, cut func()) (done func(), ok bool) {
	return s.pass(ctx, method, cut)
}

// The director is told of calls whose methods are not known, and of their end.
func TestUnknownMethodsAreTold(t *testing.T) {
	asked, over := make(chan string, 1), make(chan struct{}, 1)
	tell := func(_ context.Context, method string, _ func()) (func(), bool) {
		asked <- method
		return func() { over <- struct{}{} }, true
	}
	b := newBed(t, proxy.Options{Director: &strange{&director{}, tell}})
	for _, method := range []string{methodNew, methodAlien} {
		s := exchange(testContext(t), b.proxied, method, []byte("x"))
		if s.Code != codes.OK || !slices.Equal(s.Events, []string{`message "x"`}) {
			t.Errorf("%+v", s)
		}
		if m := <-asked; m != method {
			t.Errorf("told of %s", m)
		}
		<-over
	}
	// Known ones are asked for in another way, also those that are no calls of their method.
	for _, reqs := range [][][]byte{{nil}, {}, {nil, nil}} {
		exchange(testContext(t), b.proxied, methodVersion, reqs...)
	}
	if len(asked) > 0 {
		t.Errorf("told of %s", <-asked)
	}
}

func TestUnknownCallIsCut(t *testing.T) {
	cuts, over := make(chan func(), 1), make(chan struct{})
	keep := func(_ context.Context, _ string, cut func()) (func(), bool) {
		cuts <- cut
		return func() { close(over) }, true
	}
	b := newBed(t, proxy.Options{Director: &strange{&director{}, keep}})
	left := make(chan struct{})
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		_ = s.SendMsg(new([]byte))
		<-s.Context().Done()
		close(left)
		return nil
	})
	stream, err := b.proxied.NewStream(testContext(t), &anyStream, methodNew)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new([]byte)); err != nil {
		t.Fatal(err)
	}
	(<-cuts)()
	var s seen
	if s.read(stream); s.Code != codes.Unavailable || !strings.Contains(s.Message, "call again") {
		t.Errorf("%+v", s)
	}
	<-over
	<-left
}

// A call that waits when the view goes to another process is answered by that one.
func TestUnknownCallFollowsTheView(t *testing.T) {
	asked, given := make(chan struct{}, 1), make(chan struct{})
	wait := func(ctx context.Context, _ string, _ func()) (func(), bool) {
		asked <- struct{}{}
		select {
		case <-given:
		case <-ctx.Done():
		}
		return nil, false
	}
	b := newBed(t, proxy.Options{Director: &strange{&director{}, wait}})
	other := newBed(t, proxy.Options{})
	other.backend.answer(answering)
	call := make(chan *seen, 1)
	go func() { call <- exchange(testContext(t), b.proxied, methodNew, []byte("x")) }()
	<-asked
	held, err := b.server.Hold(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	close(given)
	to, err := proxy.NewUpstream(other.listen, proxy.UpstreamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	held.Divert(to.Conn())
	if s := <-call; s.Code != codes.OK || !slices.Equal(s.Events, []string{`message "runtime says x"`}) {
		t.Errorf("%+v", s)
	}
}

// Callers choose names: what is none of the CRI's, or too much of it, is not kept.
func TestNamesOfUnknownMethods(t *testing.T) {
	b := newBed(t, proxy.Options{})
	long := "/runtime.v1.RuntimeService/" + strings.Repeat("L", 128)
	for _, method := range []string{
		methodVersion, methodNew, methodNew, methodAlien, long,
		"/runtime.v1.RuntimeService/Li\x1bst", "/runtime.v1.RuntimeService/%s",
	} {
		exchange(testContext(t), b.proxied, method, nil)
	}
	got := b.server.Stats().UnknownMethods
	if !slices.Equal(got, []string{"runtime.v1.RuntimeService/NotYetInvented"}) {
		t.Errorf("%q", got)
	}
	for i := range 100 {
		exchange(testContext(t), b.proxied, fmt.Sprintf("/runtime.v1.RuntimeService/List%d", i), nil)
	}
	if n := len(b.server.Stats().UnknownMethods); n != 32 {
		t.Errorf("%d names are kept", n)
	}
}
