// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bufio"
	"context"
	"io"
	goruntime "runtime"
	"runtime/pprof"
	"runtime/trace"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// chunkSize is the size of the pieces of a profile.
	chunkSize = 64 << 10
	// maxDuration bounds how long a profile takes.
	maxDuration = 10 * time.Minute
)

// profiles are those of runtime/pprof that need no further settings.
var profiles = map[string]bool{"heap": true, "allocs": true, "goroutine": true, "threadcreate": true}

// Server implements [opsv1.DebugServer].
type Server struct {
	opsv1.UnimplementedDebugServer
	// Stopping is closed when the daemon ends, which does not wait for a profile.
	Stopping <-chan struct{}
}

// Profile implements [opsv1.DebugServer].
func (s *Server) Profile(req *opsv1.ProfileRequest, stream grpc.ServerStreamingServer[opsv1.ProfileChunk]) error {
	d := req.GetDuration().AsDuration()
	if d < 0 || d > maxDuration {
		return status.Errorf(codes.InvalidArgument, "a duration of %s; want one up to %s", d, maxDuration)
	}
	out := bufio.NewWriterSize(chunks{stream}, chunkSize)
	var err error
	switch name := req.GetName(); {
	case name == "cpu":
		err = s.during(stream.Context(), d, 30*time.Second, out, pprof.StartCPUProfile, pprof.StopCPUProfile)
	case name == "trace":
		err = s.during(stream.Context(), d, 5*time.Second, out, trace.Start, trace.Stop)
	case profiles[name]:
		if name == "heap" {
			goruntime.GC() // what is live now, as net/http/pprof does with ?gc=1
		}
		form := 0
		if req.GetText() {
			form = 1
			if name == "goroutine" {
				form = 2 // as a panic prints them, each for itself
			}
		}
		err = pprof.Lookup(name).WriteTo(out, form)
	default:
		return status.Errorf(codes.InvalidArgument, "no profile %q; want cpu, trace, heap, allocs, "+
			"goroutine or threadcreate", name)
	}
	if err != nil {
		return err
	}
	return out.Flush()
}

// during takes a profile for the duration d, or for otherwise if d is 0.
func (s *Server) during(
	ctx context.Context, d, otherwise time.Duration, out io.Writer, start func(io.Writer) error, stop func(),
) error {
	if d == 0 {
		d = otherwise
	}
	if err := start(out); err != nil {
		return status.Errorf(codes.FailedPrecondition, "%v; try again later", err)
	}
	defer stop()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-s.Stopping:
		return nil // the part that there is
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// chunks sends what is written.
type chunks struct {
	stream grpc.ServerStreamingServer[opsv1.ProfileChunk]
}

func (c chunks) Write(b []byte) (int, error) {
	return len(b), c.stream.Send(&opsv1.ProfileChunk{Data: b})
}
