// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Each test is a line of what a transparent proxy must keep. All compare the
// same program run direct and proxied.

var everyKind = []string{methodVersion, methodEvents, methodList, methodNew, methodAlien}

func sum(b []byte) [32]byte { return sha256.Sum256(b) }

// eachKind runs f for a method of every kind.
func eachKind(t *testing.T, f func(t *testing.T, method string)) {
	for _, method := range everyKind {
		t.Run(strings.ReplaceAll(method[1:], "/", "."), func(t *testing.T) { f(t, method) })
	}
}

func TestMessagesPass(t *testing.T) {
	b := newBed(t, proxy.Options{})
	eachKind(t, func(t *testing.T, method string) {
		got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
			return exchange(ctx, conn, method, []byte("ping"))
		})
		if !slices.Equal(got.Events, []string{`message "ping"`}) || got.Code != codes.OK {
			t.Errorf("echo gave %+v", got)
		}
	})
}

func TestRequestMetadata(t *testing.T) {
	b := newBed(t, proxy.Options{})
	md := metadata.Pairs(
		"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		"baggage", "a=1,b=2",
		"containerd-namespace", "k8s.io",
		"several", "one", "several", "two", "several", "one",
		"empty", "",
		"raw-bin", "\x00\xff\x80 binary, with comma",
		"raw-bin", "",
		"grpc-trace-bin", "\x01\x02",
		"grpc-previous-rpc-attempts", "3",
		"UPPER", "case",
		"x-long", strings.Repeat("v", 20<<10),
	)
	eachKind(t, func(t *testing.T, method string) {
		b.same(t, func(ctx context.Context, conn *grpc.ClientConn, backend *seen) *seen {
			b.backend.answer(func(method string, s grpc.ServerStream) error {
				backend.mark("method %s", method)
				in, _ := metadata.FromIncomingContext(s.Context())
				in.Delete("user-agent") // belongs to the hop
				backend.Header = in
				return echo(method, s)
			})
			got := exchange(metadata.NewOutgoingContext(ctx, md), conn, method, []byte("ping"))
			if len(backend.Header["several"]) != 3 ||
				backend.Header["raw-bin"][0] != "\x00\xff\x80 binary, with comma" {
				t.Errorf("the runtime got %v", backend.Header)
			}
			return got
		})
	})
}

// What the caller says outside its metadata reaches the runtime too.
func TestAuthorityAndContentType(t *testing.T) {
	b := newBed(t, proxy.Options{})
	for _, path := range []string{b.backend.path, b.listen} {
		conn := dial(t, path, grpc.WithAuthority("node.example:8443"))
		var got metadata.MD
		b.backend.answer(func(method string, s grpc.ServerStream) error {
			got, _ = metadata.FromIncomingContext(s.Context())
			return echo(method, s)
		})
		for _, method := range []string{methodVersion, methodNew} {
			if s, _ := invoke(testContext(t), conn, method, nil, grpc.CallContentSubtype("proto")); s.Code != codes.OK {
				t.Fatalf("%s: %s", method, s.Message)
			}
			if a := got[":authority"]; len(a) != 1 || a[0] != "node.example:8443" {
				t.Errorf("%s by %s: authority %q", method, path, a)
			}
			if c := got["content-type"]; len(c) != 1 || c[0] != "application/grpc+proto" {
				t.Errorf("%s by %s: content type %q", method, path, c)
			}
			if s, _ := invoke(testContext(t), b.proxied, method, nil); s.Code != codes.OK {
				t.Fatalf("%s: %s", method, s.Message)
			}
			if c := got["content-type"]; len(c) != 1 || c[0] != "application/grpc" {
				t.Errorf("%s: plain content type became %q", method, c)
			}
		}
	}
}

func TestHeaderAndTrailer(t *testing.T) {
	b := newBed(t, proxy.Options{})
	header := metadata.Pairs("h", "1", "h", "2", "h-bin", "\x00\x01\xfe", "h-empty", "")
	trailer := metadata.Pairs("t", "1", "t", "2", "t-bin", "\xff\x00", "t-empty", "")
	failure := status.Error(codes.FailedPrecondition, "no")
	for _, tc := range []struct {
		name  string
		serve func(s grpc.ServerStream) error
	}{
		{"with a message", func(s grpc.ServerStream) error {
			s.SetTrailer(trailer)
			_ = s.SetHeader(header)
			return s.SendMsg(new([]byte))
		}},
		{"no metadata of its own", func(s grpc.ServerStream) error { return s.SendMsg(new([]byte)) }},
		{"header sent, then an error", func(s grpc.ServerStream) error {
			_ = s.SendHeader(header)
			s.SetTrailer(trailer)
			return failure
		}},
		{"empty header sent, then an error", func(s grpc.ServerStream) error {
			_ = s.SendHeader(nil)
			return failure
		}},
		{"header set but not sent, then an error", func(s grpc.ServerStream) error {
			_ = s.SetHeader(header)
			return failure
		}},
		{"trailers only", func(s grpc.ServerStream) error {
			s.SetTrailer(trailer)
			return failure
		}},
		{"trailers only, none of its own", func(grpc.ServerStream) error { return failure }},
		{"a message, then an error", func(s grpc.ServerStream) error {
			s.SetTrailer(trailer)
			_ = s.SendMsg(new([]byte))
			return failure
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.backend.answer(func(_ string, s grpc.ServerStream) error { return tc.serve(s) })
			eachKind(t, func(t *testing.T, method string) {
				if method == methodVersion && tc.name == "a message, then an error" {
					b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
						s, _ := invoke(ctx, conn, method, nil)
						return s
					})
					return
				}
				got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
					return exchange(ctx, conn, method, nil)
				})
				if only := strings.HasPrefix(tc.name, "trailers only"); only != (got.Header == nil) {
					t.Errorf("header %v", got.Header)
				}
			})
		})
	}
}

// A stream that sends its header early, before there is anything to say.
func TestHeaderBeforeFirstMessage(t *testing.T) {
	b := newBed(t, proxy.Options{})
	for _, method := range everyKind[1:] {
		t.Run(method, func(t *testing.T) {
			b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
				said := make(chan struct{})
				b.backend.answer(func(_ string, s grpc.ServerStream) error {
					_ = s.SendHeader(metadata.Pairs("early", "yes"))
					select {
					case <-said:
					case <-s.Context().Done():
						return s.Context().Err()
					}
					return s.SendMsg(new([]byte))
				})
				var s seen
				stream, err := conn.NewStream(ctx, &anyStream, method)
				if err != nil {
					t.Fatal(err)
				}
				_ = stream.SendMsg(new([]byte))
				_ = stream.CloseSend()
				if s.Header, _ = stream.Header(); s.Header == nil { // hangs if it is held back
					t.Error("no header")
				}
				close(said)
				s.read(stream)
				return &s
			})
		})
	}
}

func TestStatus(t *testing.T) {
	b := newBed(t, proxy.Options{})
	detailed, err := status.New(codes.ResourceExhausted, "with details").WithDetails(
		durationpb.New(time.Hour), wrapperspb.String("who: \u00e4\u4e16"), wrapperspb.Bytes(
			bytes.Repeat([]byte{0, 255}, 3000),
		))
	if err != nil {
		t.Fatal(err)
	}
	errs := map[string]error{
		"details":        detailed.Err(),
		"empty message":  status.Error(codes.NotFound, ""),
		"percent":        status.Error(codes.Unknown, "100% of %41 \"quoted\""),
		"unicode":        status.Error(codes.Internal, "größe 世界 \U0001f433"),
		"lines":          status.Error(codes.Internal, "first\n\tsecond\r\nthird \x00 \x7f"),
		"not UTF-8":      status.Error(codes.Internal, "\xff\xfe broken"),
		"long":           status.Error(codes.Aborted, strings.Repeat("long ", 8<<10)),
		"no status":      io.ErrUnexpectedEOF,
		"context":        context.DeadlineExceeded,
		"canceled":       context.Canceled,
		"code above all": status.Error(4711, "of the future"),
		"kubelet's own":  status.Error(codes.Unknown, "RegistryUnavailable: pull QPS exceeded"),
	}
	for code := codes.Code(1); code <= 17; code++ {
		errs[code.String()] = status.Error(code, "code "+code.String())
	}
	eachKind(t, func(t *testing.T, method string) {
		for name, err := range errs {
			t.Run(name, func(t *testing.T) {
				b.backend.answer(func(string, grpc.ServerStream) error { return err })
				b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
					return exchange(ctx, conn, method, []byte("ping"))
				})
			})
		}
	})
}

// sizes are around the tiers of gRPC's buffer pools (1, 16, 32 KiB, 1 MiB), its
// frames (16 KiB) and windows (64 KiB), up to what kubelet accepts.
func sizes() []int {
	all := []int{0, 1, 5, 100}
	for _, n := range []int{256, 1 << 10, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 1 << 20} {
		all = append(all, n-6, n-5, n-1, n, n+1)
	}
	return append(all, 4<<20, 16<<20)
}

func TestSizes(t *testing.T) {
	b := newBed(t, proxy.Options{})
	random := rand.New(rand.NewPCG(1, 2))
	for _, n := range sizes() {
		msg := make([]byte, n)
		for i := range msg {
			msg[i] = byte(random.Uint32())
		}
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			for _, method := range everyKind {
				s := exchange(testContext(t), b.proxied, method, msg)
				if want := []string{"message " + digest(msg)}; !slices.Equal(s.Events, want) || s.Code != codes.OK {
					t.Errorf("%s: got %v, %v %s, want %v", method, s.Events, s.Code, s.Message, want)
				}
			}
			// The same memory twice: pooled buffers handed on too early would mix.
			s := exchange(testContext(t), b.proxied, methodNew, msg, []byte("between"), msg)
			want := []string{"message " + digest(msg), `message "between"`, "message " + digest(msg)}
			if !slices.Equal(s.Events, want) {
				t.Errorf("three messages: got %v", s.Events)
			}
		})
	}
}

// The proxy has no limit of its own, and does not lift those of its peers.
func TestPeersKeepTheirLimits(t *testing.T) {
	b := newBed(t, proxy.Options{}, grpc.MaxRecvMsgSize(32<<10), grpc.MaxSendMsgSize(64<<10))
	for _, tc := range []struct {
		name     string
		req, max int
		resp     int
		want     codes.Code
	}{
		{"runtime receives", 32<<10 + 1, 1 << 20, 0, codes.ResourceExhausted},
		{"runtime sends", 0, 1 << 20, 64<<10 + 1, codes.ResourceExhausted},
		{"caller receives", 0, 10 << 10, 10<<10 + 1, codes.ResourceExhausted},
		{"all within", 32 << 10, 64 << 10, 64 << 10, codes.OK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.backend.answer(func(_ string, s grpc.ServerStream) error {
				if err := s.RecvMsg(new([]byte)); err != nil {
					return err
				}
				resp := make([]byte, tc.resp)
				return s.SendMsg(&resp)
			})
			for _, method := range everyKind {
				got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
					s, _ := invoke(ctx, conn, method, make([]byte, tc.req), grpc.MaxCallRecvMsgSize(tc.max))
					return s
				})
				if got.Code != tc.want {
					t.Errorf("%s: %v %s", method, got.Code, got.Message)
				}
			}
		})
	}
}

func TestDeadlineArrives(t *testing.T) {
	b := newBed(t, proxy.Options{})
	eachKind(t, func(t *testing.T, method string) {
		left := make(chan time.Duration, 1)
		b.backend.answer(func(_ string, s grpc.ServerStream) error {
			left <- -1
			if d, ok := s.Context().Deadline(); ok {
				<-left
				left <- time.Until(d)
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
		defer cancel()
		exchange(ctx, b.proxied, method, nil)
		if d := <-left; d < 80*time.Second || d > 91*time.Second {
			t.Errorf("the runtime has %v of 90 s left", d)
		}
		// PullImage comes from kubelet without any.
		exchange(t.Context(), b.proxied, method, nil)
		if d := <-left; d != -1 {
			t.Errorf("the proxy made up a deadline in %v", d)
		}
	})
}

// The end of the caller's context reaches the runtime, and the caller gets the
// context's own code.
func TestCallerGivesUp(t *testing.T) {
	b := newBed(t, proxy.Options{})
	eachKind(t, func(t *testing.T, method string) {
		for _, tc := range []struct {
			name string
			code codes.Code
			open bool // the caller has not closed its side
		}{
			{"cancel", codes.Canceled, false}, {"deadline", codes.DeadlineExceeded, false},
			{"cancel while sending", codes.Canceled, true},
		} {
			t.Run(tc.name, func(t *testing.T) {
				if tc.open && (method == methodVersion || method == methodEvents || method == methodList) {
					t.Skip("takes one request")
				}
				got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, backend *seen) *seen {
					if tc.code == codes.Canceled {
						s, _ := giveUp(ctx, t, b, conn, method, tc.open, 0)
						return s
					}
					// A deadline may end before the call has come to the runtime, which says
					// nothing; then it gets more.
					s, came := giveUp(ctx, t, b, conn, method, tc.open, 100*time.Millisecond)
					for left := 200 * time.Millisecond; !came && ctx.Err() == nil; left *= 2 {
						s, came = giveUp(ctx, t, b, conn, method, tc.open, left)
					}
					if !came {
						t.Error("the call does not come to the runtime")
					}
					// Caller and runtime have a timer each, and gRPC words it after
					// whose is first, without a proxy too.
					s.Message, s.Details, s.Trailer = "", nil, nil
					return s
				})
				if got.Code != tc.code {
					t.Errorf("%v %s", got.Code, got.Message)
				}
			})
		}
	})
}

// giveUp makes a call that the caller leaves: at its deadline, or, without one, when the runtime
// has it. It returns what the caller sees, and whether the call came to the runtime, which then has
// heard of the end.
func giveUp(
	ctx context.Context, t *testing.T, b *bed, conn *grpc.ClientConn, method string, open bool, deadline time.Duration,
) (*seen, bool) {
	t.Helper()
	this := cryptorand.Text()
	began, ended := make(chan struct{}), make(chan struct{})
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		in, _ := metadata.FromIncomingContext(s.Context())
		if !slices.Equal(in["call"], []string{this}) {
			return nil // one that was left before, and comes late
		}
		defer close(ended)
		close(began)
		<-s.Context().Done()
		return s.Context().Err()
	})
	var cancel context.CancelFunc
	if deadline > 0 {
		ctx, cancel = context.WithTimeout(ctx, deadline)
	} else {
		ctx, cancel = context.WithCancel(ctx)
		go func() { <-began; cancel() }()
	}
	defer cancel()
	var s seen
	stream, err := conn.NewStream(metadata.AppendToOutgoingContext(ctx, "call", this), &anyStream, method)
	if err != nil {
		s.end(err)
		return &s, false
	}
	_ = stream.SendMsg(new([]byte))
	if !open {
		_ = stream.CloseSend()
	}
	s.read(stream)
	select {
	case <-began:
	default:
		return &s, false
	}
	select {
	case <-ended:
	case <-time.After(waitLong):
		t.Error("the runtime never heard of it")
	}
	return &s, true
}

// Whatever order the two sides choose, in a method of which only the caller and
// the runtime know the kind.
func TestBidiOrder(t *testing.T) {
	b := newBed(t, proxy.Options{})
	for _, tc := range []struct {
		name  string
		serve func(s grpc.ServerStream, note *seen) error
		call  func(s grpc.ClientStream, note *seen)
	}{
		{"ping-pong, half-close last", func(s grpc.ServerStream, _ *seen) error {
			return echo("", s)
		}, func(s grpc.ClientStream, note *seen) {
			for i := range 20 {
				m := fmt.Appendf(nil, "m%d", i)
				_ = s.SendMsg(&m)
				_ = s.RecvMsg(&m)
				note.mark("%s", m)
			}
			_ = s.CloseSend()
		}},
		{"answers after half-close", func(s grpc.ServerStream, note *seen) error {
			n := 0
			for s.RecvMsg(new([]byte)) == nil {
				n++
			}
			note.mark("%d, then half-closed", n)
			for range n {
				_ = s.SendMsg(new([]byte))
			}
			return nil
		}, func(s grpc.ClientStream, _ *seen) {
			for range 50 {
				_ = s.SendMsg(new([]byte))
			}
			_ = s.CloseSend()
		}},
		{"half-close without a message", func(s grpc.ServerStream, note *seen) error {
			note.mark("%v", s.RecvMsg(new([]byte)))
			return s.SendMsg(new([]byte))
		}, func(s grpc.ClientStream, _ *seen) { _ = s.CloseSend() }},
		{"runtime ends while the caller still sends", func(s grpc.ServerStream, _ *seen) error {
			_ = s.RecvMsg(new([]byte))
			return status.Error(codes.OutOfRange, "enough")
		}, func(s grpc.ClientStream, _ *seen) {
			for s.SendMsg(new([]byte)) == nil { // ends when the status is in
			}
		}},
		{"runtime speaks first", func(s grpc.ServerStream, note *seen) error {
			_ = s.SendMsg(&[]byte{'h', 'i'})
			err := s.RecvMsg(new([]byte))
			note.mark("%v", err)
			return nil
		}, func(s grpc.ClientStream, note *seen) {
			var m []byte
			note.mark("%v %s", s.RecvMsg(&m), m)
			_ = s.SendMsg(&m)
			_ = s.CloseSend()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, method := range []string{methodNew, methodAlien} {
				b.same(t, func(ctx context.Context, conn *grpc.ClientConn, backend *seen) *seen {
					b.backend.answer(func(_ string, s grpc.ServerStream) error { return tc.serve(s, backend) })
					stream, err := conn.NewStream(ctx, &anyStream, method)
					if err != nil {
						t.Fatal(err)
					}
					var s seen
					tc.call(stream, &s)
					s.read(stream)
					return &s
				})
			}
		})
	}
}

// A caller that breaks the rules of a known method hears it from the runtime.
func TestWrongNumberOfRequests(t *testing.T) {
	b := newBed(t, proxy.Options{})
	b.backend.answer(func(_ string, s grpc.ServerStream) error {
		n := 0
		for s.RecvMsg(new([]byte)) == nil {
			n++
		}
		return status.Errorf(codes.InvalidArgument, "%d requests", n)
	})
	for _, method := range []string{methodVersion, methodEvents} {
		for n := range 4 {
			got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
				return exchange(ctx, conn, method, make([][]byte, n)...)
			})
			if want := fmt.Sprintf("%d requests", n); got.Message != want {
				t.Errorf("%s: %q", method, got.Message)
			}
		}
	}
}

func TestCompression(t *testing.T) {
	b := newBed(t, proxy.Options{})
	msg := bytes.Repeat([]byte("compressible "), 5000)
	eachKind(t, func(t *testing.T, method string) {
		b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
			s, resp := invoke(ctx, conn, method, msg, grpc.UseCompressor(gzip.Name))
			s.mark("%s", digest(resp))
			return s
		})
	})
}

// Unimplemented makes kubelet stop using a method for good. It comes from the
// runtime alone, word for word.
func TestUnimplementedIsTheRuntimes(t *testing.T) {
	b := newBed(t, proxy.Options{})
	const message = "unknown method StreamContainers for service runtime.v1.RuntimeService"
	b.backend.answer(func(string, grpc.ServerStream) error { return status.Error(codes.Unimplemented, message) })
	eachKind(t, func(t *testing.T, method string) {
		got := b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
			return exchange(ctx, conn, method, nil)
		})
		if got.Code != codes.Unimplemented || got.Message != message {
			t.Errorf("%v %s", got.Code, got.Message)
		}
	})
	b.backend.stop()
	defer b.backend.start(t) // for the cleanup
	eachKind(t, func(t *testing.T, method string) {
		if got := exchange(testContext(t), b.proxied, method, nil); got.Code != codes.Unavailable {
			t.Errorf("runtime away: %v %s", got.Code, got.Message)
		}
	})
}

// A slow reader stalls the runtime instead of filling the proxy's memory.
func TestBackpressure(t *testing.T) {
	b := newBed(t, proxy.Options{})
	const size = 256 << 10
	for _, method := range []string{methodEvents, methodNew} {
		t.Run(method, func(t *testing.T) {
			sent := make(chan int, 1<<10) // never full
			b.backend.answer(func(_ string, s grpc.ServerStream) error {
				_ = s.RecvMsg(new([]byte))
				m := make([]byte, size)
				for i := range 1 << 10 {
					if err := s.SendMsg(&m); err != nil {
						return err
					}
					sent <- i
				}
				return nil
			})
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			stream, err := b.proxied.NewStream(ctx, &anyStream, method)
			if err != nil {
				t.Fatal(err)
			}
			_ = stream.SendMsg(new([]byte))
			_ = stream.CloseSend()
			// Silence for a while is what being stalled looks like; the bound below
			// holds however early it is taken for that.
			n := 0
			for quiet := false; !quiet; {
				select {
				case n = <-sent:
				case <-time.After(300 * time.Millisecond):
					quiet = true
				}
			}
			if got := n * size; got > 24<<20 {
				t.Errorf("%d MiB were taken from the runtime while nobody read", got>>20)
			}
			for range n + 10 { // reading gets it going again
				var m []byte
				if err := stream.RecvMsg(&m); err != nil || len(m) != size {
					t.Fatalf("%d bytes, %v", len(m), err)
				}
			}
		})
	}
}

// Nothing but the caller repeats a call, however it went wrong.
func TestNoCallIsRepeated(t *testing.T) {
	b := newBed(t, proxy.Options{})
	calls := make(chan string, 100)
	b.backend.answer(func(method string, s grpc.ServerStream) error {
		_ = s.RecvMsg(new([]byte))
		calls <- method
		return status.Error(codes.Unavailable, "try again")
	})
	eachKind(t, func(t *testing.T, method string) {
		if got := exchange(testContext(t), b.proxied, method, nil); got.Message != "try again" {
			t.Errorf("%v %s", got.Code, got.Message)
		}
		if <-calls; len(calls) != 0 {
			t.Errorf("%d calls too many", len(calls))
		}
	})
}

// Typed clients work on the upstream connection beside the raw calls, and typed
// services beside the raw handler.
func TestTypedBesideRaw(t *testing.T) {
	b := newBed(t, proxy.Options{Register: func(r grpc.ServiceRegistrar) {
		r.RegisterService(&grpc.ServiceDesc{
			ServiceName: "criproxy.test.Local",
			HandlerType: (*any)(nil),
			Methods: []grpc.MethodDesc{{MethodName: "Answer", Handler: func(
				_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor,
			) (any, error) {
				var in runtimeapi.VersionRequest
				if err := decode(&in); err != nil {
					return nil, err
				}
				return &runtimeapi.VersionResponse{Version: in.Version + " answered here"}, nil
			}}},
		}, struct{}{})
	}})
	ctx := testContext(t)
	in, out := &runtimeapi.VersionRequest{Version: "v1"}, new(runtimeapi.VersionResponse)
	err := b.proxied.Invoke(ctx, "/criproxy.test.Local/Answer", in, out)
	if err != nil || out.Version != "v1 answered here" {
		t.Errorf("local service: %v, %v", out, err)
	}
	got, err := runtimeapi.NewRuntimeServiceClient(b.upstream.Conn()).Version(ctx, in)
	if err != nil || got.Version != "v1" { // echoed by the backend, field by field
		t.Errorf("typed client upstream: %v, %v", got, err)
	}
	got, err = runtimeapi.NewRuntimeServiceClient(b.proxied).Version(ctx, in)
	if err != nil || got.Version != "v1" {
		t.Errorf("typed client through the proxy: %v, %v", got, err)
	}
	// An unknown method of the local service is the runtime's affair.
	if got := exchange(ctx, b.proxied, "/criproxy.test.Local/Other", []byte("x")); got.Code != codes.OK {
		t.Errorf("%v %s", got.Code, got.Message)
	}
}
