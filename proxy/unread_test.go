// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/cri-proxy/cri-proxy/proxy"
)

const (
	mib         = 1 << 20
	methodLists = "/runtime.v1.RuntimeService/ListContainers"
)

// lists is a runtime whose every answer is as large as the request says, in MiB, and which tells
// when it has given it away.
func lists(given chan<- struct{}) func(string, grpc.ServerStream) error {
	return func(_ string, s grpc.ServerStream) error {
		var req []byte
		if err := s.RecvMsg(&req); err != nil {
			return err
		}
		m := make([]byte, int(req[0])*mib)
		err := s.SendMsg(&m)
		given <- struct{}{}
		return err
	}
}

// ask makes a call whose answer nobody reads.
func ask(ctx context.Context, t testing.TB, conn *grpc.ClientConn, method string, size byte) grpc.ClientStream {
	t.Helper()
	stream, err := conn.NewStream(ctx, &anyStream, method)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.SendMsg(&[]byte{size}); err != nil {
		t.Fatal(err)
	}
	_ = stream.CloseSend()
	return stream
}

// read returns the size of an answer, in MiB, or its status.
func read(stream grpc.ClientStream) (int, codes.Code) {
	var m []byte
	if err := stream.RecvMsg(&m); err != nil {
		return 0, status.Code(err)
	}
	if err := stream.RecvMsg(new([]byte)); err != io.EOF { //nolint:errorlint // gRPC's own
		return 0, status.Code(err)
	}
	return len(m) / mib, codes.OK
}

// stingy is a client that takes little ahead of its reading.
func stingy(t testing.TB, b *bed) *grpc.ClientConn {
	t.Helper()
	return dial(t, b.listen, grpc.WithStaticStreamWindowSize(mib), grpc.WithStaticConnWindowSize(mib))
}

// Lists of 16 MiB that nobody reads, of which twenty took 190 MiB.
func TestUnreadAnswersAreBounded(t *testing.T) {
	for method, calls := range map[string]int{methodLists: 8, methodList: 6, methodNew: 6} {
		t.Run(method, func(t *testing.T) {
			b := newBed(t, proxy.Options{}, grpc.MaxSendMsgSize(64*mib))
			given := make(chan struct{}, 64)
			b.backend.answer(lists(given))
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			conn := stingy(t, b)
			var streams []grpc.ClientStream
			for range calls {
				streams = append(streams, ask(ctx, t, conn, method, 16))
			}
			for range streams {
				<-given
			}
			awaitInFlight(t, b.server, 0) // it is decided of all
			// Who has nothing unread is served, kubelet for one.
			if n, code := read(ask(ctx, t, b.proxied, methodLists, 16)); n != 16 || code != codes.OK {
				t.Errorf("another client: %d MiB, %s", n, code)
			}
			<-given
			whole, refused := 0, 0
			for _, s := range streams {
				switch n, code := read(s); {
				case code == codes.OK && n == 16:
					whole++
				case code == codes.ResourceExhausted:
					refused++
				default:
					t.Errorf("%d MiB, %s", n, code)
				}
			}
			if whole < 1 || whole > 4 || whole+refused != len(streams) {
				t.Errorf("%d answers were kept for who does not read, %d refused", whole, refused)
			}
			// Once all is read there is room again.
			if n, code := read(ask(ctx, t, conn, method, 16)); n != 16 || code != codes.OK {
				t.Errorf("after reading: %d MiB, %s", n, code)
			}
		})
	}
}

// Clients that read nothing take no room from those that do, however many there are; and one answer
// is had by everybody, whatever its size.
func TestUnreadAnswersOfOthers(t *testing.T) {
	b := newBed(t, proxy.Options{}, grpc.MaxSendMsgSize(128*mib))
	given := make(chan struct{}, 64)
	b.backend.answer(lists(given))
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	for range 4 {
		conn := stingy(t, b)
		for range 4 {
			ask(ctx, t, conn, methodLists, 16)
		}
		for range 4 {
			<-given
		}
	}
	awaitInFlight(t, b.server, 0)
	kubelet := stingy(t, b)
	both := []grpc.ClientStream{ask(ctx, t, kubelet, methodLists, 16), ask(ctx, t, kubelet, methodLists, 16)}
	for _, s := range both {
		<-given
		if n, code := read(s); n != 16 || code != codes.OK {
			t.Errorf("%d MiB, %s", n, code)
		}
	}
	big := dial(t, b.listen,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(128*mib), grpc.ForceCodecV2(bytesCodec{})))
	if n, code := read(ask(ctx, t, big, methodLists, 100)); n != 100 || code != codes.OK {
		t.Errorf("one of 100 MiB: %d MiB, %s", n, code)
	}
}

// What is cancelled, at whatever moment, is given back.
func TestUnreadAnswersThatAreCancelled(t *testing.T) {
	b := newBed(t, proxy.Options{}, grpc.MaxSendMsgSize(64*mib))
	given := make(chan struct{}, 1000)
	b.backend.answer(lists(given))
	conn := stingy(t, b)
	var callers sync.WaitGroup
	for i := range 300 {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(testContext(t), time.Duration(i%60)*100*time.Microsecond)
			defer cancel()
			if stream, err := conn.NewStream(ctx, &anyStream, methodLists); err == nil {
				_ = stream.SendMsg(&[]byte{1})
				_ = stream.CloseSend()
				if i%2 == 0 {
					_ = stream.RecvMsg(new([]byte))
				}
			}
			<-ctx.Done()
		})
	}
	callers.Wait()
	awaitInFlight(t, b.server, 0)
	b.backend.stop() // with it end the calls that it has not noticed the end of
	for len(given) > 0 {
		<-given
	}
	b.backend.start(t)
	awaitState(t, b.upstream, connectivity.Ready)
	// All of the room is there: four at once, none of which is read before all have been given.
	for until := time.Now().Add(waitLong); ; {
		runtime.GC() // what gRPC has dropped on the way counts until its memory is free
		ctx, cancel := context.WithCancel(testContext(t))
		var streams []grpc.ClientStream
		for range 4 {
			streams = append(streams, ask(ctx, t, conn, methodLists, 16))
		}
		for range streams {
			<-given
		}
		awaitInFlight(t, b.server, 0)
		whole := 0
		for _, s := range streams {
			if n, _ := read(s); n == 16 {
				whole++
			}
		}
		cancel()
		if whole == 4 {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("there is room for %d answers only", whole)
		}
	}
}
