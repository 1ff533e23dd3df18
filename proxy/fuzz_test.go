// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// FuzzDifferential makes up a call - method, frames both ways, metadata both
// ways, status with details - and compares it direct and proxied.
//
// requests and responses hold one byte for each frame: its low six bits and
// high two bits make the size, see frameOf.
func FuzzDifferential(f *testing.F) {
	f.Add(methodVersion, []byte{9}, []byte{9}, "traceparent=00-1-2-01", "h=1", "t-bin=\x00\xff", uint32(0), "", false)
	f.Add(methodVersion, []byte{0}, []byte{}, "", "", "", uint32(5), "no such container \"x\"", true)
	f.Add(methodVersion, []byte{0x7f, 0xff}, []byte{0xff}, "", "", "a=;b=", uint32(0), "", false)
	f.Add(
		methodEvents, []byte{0x40}, []byte{1, 0x50, 0xc1, 2, 0}, "raw-bin=\xff", "early=1", "", uint32(14),
		"runtime\nrestarts 100%", true,
	)
	f.Add(methodList, []byte{}, []byte{3}, "", "", "", uint32(0), "", false)
	f.Add(
		methodNew, []byte{1, 0xbf, 2, 0x80, 0x41}, []byte{0xc3, 0}, "a=1;a=2;b-bin=", "c=3", "d=4", uint32(2),
		"RegistryUnavailable: größe", false,
	)
	f.Add(methodAlien, []byte{}, []byte{}, "", "", "", uint32(12), "unknown service example.v9.AlienService", false)
	f.Add("/x", []byte{0}, []byte{0}, "", "", "", uint32(99), "\xff", true)
	f.Add("//", []byte{0}, []byte{}, "", "h-bin=", "", uint32(0), "ignored", true)

	b := newBed(f, proxy.Options{})
	f.Fuzz(func(
		t *testing.T, method string, requests, responses []byte, md, header, trailer string, code uint32,
		message string,
		details bool,
	) {
		method = "/" + printable(strings.TrimPrefix(method, "/"), '!')
		requests, responses = requests[:min(len(requests), 8)], responses[:min(len(responses), 8)]
		end := status.New(codes.Code(code), message)
		if details && codes.Code(code) != codes.OK {
			var err error
			if end, err = end.WithDetails(wrapperspb.String(printable(message, ' ')),
				wrapperspb.UInt32(code)); err != nil {
				t.Fatal(err)
			}
		}
		if method == methodVersion {
			// A runtime that breaks the rule of one answer is told off by
			// whichever gRPC client talks to it, which is the proxy.
			switch {
			case end.Code() != codes.OK:
				responses = nil
			case len(responses) != 1:
				responses = []byte{17}
			}
		}
		b.same(t, func(ctx context.Context, conn *grpc.ClientConn, backend *seen) *seen {
			b.backend.answer(func(method string, s grpc.ServerStream) error {
				backend.mark("method %s", method)
				backend.Header, _ = metadata.FromIncomingContext(s.Context())
				backend.Header.Delete("user-agent")
				for {
					var m []byte
					err := s.RecvMsg(&m)
					if errors.Is(err, io.EOF) {
						break
					} else if err != nil {
						return err
					}
					backend.mark("request %s", digest(m))
				}
				_ = s.SetHeader(metadataOf(header))
				s.SetTrailer(metadataOf(trailer))
				for i, r := range responses {
					m := frameOf(r, i)
					if err := s.SendMsg(&m); err != nil {
						return err
					}
				}
				return end.Err()
			})
			var frames [][]byte
			for i, r := range requests {
				frames = append(frames, frameOf(r, i))
			}
			return exchangeMetadata(ctx, conn, metadataOf(md), method, frames...)
		})
	})
}

// frameOf makes a frame whose size lies around those where gRPC changes its
// buffers.
func frameOf(b byte, seed int) []byte {
	size := int(b & 0x3f)
	if base := []int{0, 1 << 10, 16 << 10, 64 << 10}[b>>6]; base > 0 {
		size += base - 32
	}
	m := make([]byte, size)
	random := rand.NewPCG(uint64(b), uint64(seed))
	for i := range m {
		m[i] = byte(random.Uint64())
	}
	return m
}

// metadataOf reads key=value pairs with semicolons between. Keys get a prefix,
// for some, such as host, mean something to HTTP.
func metadataOf(s string) metadata.MD {
	md := metadata.MD{}
	for pair := range strings.SplitSeq(s, ";") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			continue
		}
		key = "x-" + strings.Map(func(r rune) rune {
			if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.", r) {
				return r
			}
			return '.'
		}, key)
		if !strings.HasSuffix(key, "-bin") {
			value = printable(value, ' ')
		}
		md.Append(key, value)
	}
	return md
}

// printable replaces what may not stand in an HTTP field, and all below first.
func printable(s string, first byte) string {
	b := []byte(s)
	for i := range b {
		if b[i] < first || b[i] > '~' {
			b[i] = '.'
		}
	}
	return string(b)
}
