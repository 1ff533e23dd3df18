// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestProfiles(t *testing.T) {
	c := newConfig(t)
	d := start(t, c)
	debug := opsv1.NewDebugClient(dial(t, c.AdminSocket))
	take := func(req *opsv1.ProfileRequest) ([]byte, error) {
		stream, err := debug.Profile(t.Context(), req, grpc.WaitForReady(true))
		var all bytes.Buffer
		for err == nil {
			var chunk *opsv1.ProfileChunk
			if chunk, err = stream.Recv(); err == nil {
				all.Write(chunk.GetData())
			}
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return all.Bytes(), err
	}
	for _, tt := range []struct {
		name string
		req  *opsv1.ProfileRequest
		want string // in it, when it is text
		code codes.Code
	}{
		{name: "heap", req: &opsv1.ProfileRequest{Name: "heap"}},
		{name: "cpu", req: &opsv1.ProfileRequest{Name: "cpu", Duration: durationpb.New(10 * time.Millisecond)}},
		{name: "goroutines as text", req: &opsv1.ProfileRequest{Name: "goroutine", Text: true}, want: "daemon.Run("},
		{name: "trace", req: &opsv1.ProfileRequest{Name: "trace", Duration: durationpb.New(10 * time.Millisecond)},
			want: "go 1."},
		{name: "unknown", req: &opsv1.ProfileRequest{Name: "secrets"}, code: codes.InvalidArgument},
		{name: "too long", req: &opsv1.ProfileRequest{Name: "cpu", Duration: durationpb.New(time.Hour)},
			code: codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := take(tt.req)
			if status.Code(err) != tt.code {
				t.Fatal(err)
			}
			switch {
			case err != nil:
			case tt.want != "":
				if !strings.Contains(string(got), tt.want) {
					t.Errorf("no %q in it:\n%.2000s", tt.want, got)
				}
			default: // pprof's form
				z, err := gzip.NewReader(bytes.NewReader(got))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, z); err != nil { //nolint:gosec // our own
					t.Error(err)
				}
			}
		})
	}
	// One that takes its time does not keep the daemon.
	stream, err := debug.Profile(t.Context(),
		&opsv1.ProfileRequest{Name: "cpu", Duration: durationpb.New(5 * time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	d.term()
	for err == nil {
		_, err = stream.Recv()
	}
	if err := d.ended(t); err != nil {
		t.Error(err)
	}
}
