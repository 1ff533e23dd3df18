// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
)

var (
	serverStreamDesc = grpc.StreamDesc{ServerStreams: true}
	bidiDesc         = grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
)

// serverStream relays one request and the stream of its answers.
func (c *call) serverStream() error {
	take := c.directStream()
	var req frame
	if done, err := c.receiveOnly(&req); done {
		return err
	}
	ctx, cancel := context.WithCancelCause(c.client.Context())
	defer cancel(nil)
	if c.m.endless {
		c.s.inflight.markEndless(c, cancel)
	}
	if take != nil {
		return c.interceptStream(ctx, cancel, take, &req)
	}
	runtime, err := c.openServerStream(ctx, &req)
	if err != nil {
		return err
	}
	return c.download(ctx, runtime, nil)
}

// openServerStream sends the request upstream. It frees req in any case. An
// error is the call's answer.
func (c *call) openServerStream(ctx context.Context, req *frame) (grpc.ClientStream, error) {
	defer req.free()
	runtime, err := c.conn.NewStream(c.outgoing(ctx), &serverStreamDesc, c.name, c.callOptions()...)
	if err != nil {
		return nil, c.upstreamError(ctx, err)
	}
	if err := runtime.SendMsg(req); err != nil {
		return nil, c.upstreamError(ctx, err)
	}
	return runtime, nil
}

// bidi relays a call of a method of unknown kind: frames in both directions as
// they come. first are frames already read from the caller, closed says that
// the caller has closed its side.
func (c *call) bidi(first []*frame, closed bool) error {
	ctx, cancel := context.WithCancelCause(c.client.Context())
	defer cancel(nil)
	if c.m == c.s.unknown {
		done, err := c.directUnknown(ctx, cancel)
		if err != nil {
			return err
		}
		if done != nil {
			defer done()
		}
	}
	runtime, err := c.conn.NewStream(c.outgoing(ctx), &bidiDesc, c.name, c.callOptions()...)
	if err != nil {
		for _, f := range first {
			f.free()
		}
		return c.upstreamError(ctx, err)
	}
	// A caller's stream can only be read to its end, and it ends when this
	// handler has returned: the goroutine outlives the handler by that much.
	c.s.inflight.beginUpload()
	go func() {
		defer c.s.inflight.endUpload()
		if err := c.upload(runtime, first, closed); err != nil {
			cancel(err)
		}
	}()
	// One answer may be all of a unary call. A second one makes it a stream,
	// which a drain need not wait for.
	sent := 0
	return c.download(ctx, runtime, func() {
		if sent++; sent == 2 {
			c.s.inflight.markEndless(c, cancel)
		}
	})
}

// upload sends the caller's frames upstream until either side is done. The error
// is one of reading the caller; upstream ones are download's to report.
func (c *call) upload(runtime grpc.ClientStream, first []*frame, closed bool) error {
	for i, f := range first {
		if err := runtime.SendMsg(f); err != nil {
			for _, f := range first[i:] {
				f.free()
			}
			return nil
		}
	}
	for !closed {
		var f frame
		switch err := c.client.RecvMsg(&f); {
		case err == nil:
		case errors.Is(err, io.EOF):
			closed = true
			continue
		default:
			return err
		}
		err := runtime.SendMsg(&f)
		f.free()
		if err != nil {
			return nil
		}
	}
	_ = runtime.CloseSend() // download sees the outcome
	return nil
}

// download sends header, messages and trailer to the caller until the runtime
// ends the stream, and returns its status. Nothing is buffered between: a caller
// that does not read stalls the runtime, as it would without a proxy.
func (c *call) download(ctx context.Context, runtime grpc.ClientStream, sent func()) error {
	// The header may come long before the first message and is not held back.
	// There is none if the answer is only trailers.
	if header, err := runtime.Header(); err == nil && header != nil {
		if err := c.client.SendHeader(header); err != nil {
			return err
		}
	}
	for {
		var f frame
		if err := runtime.RecvMsg(&f); err != nil {
			return c.endStream(ctx, runtime, err)
		}
		if err := c.send(&f); err != nil {
			return err
		}
		if sent != nil {
			sent()
		}
	}
}

// endStream passes the trailer on and returns the status for the error that
// ended the upstream.
func (c *call) endStream(ctx context.Context, runtime grpc.ClientStream, err error) error {
	c.client.SetTrailer(runtime.Trailer())
	if errors.Is(err, io.EOF) {
		return nil
	}
	return c.upstreamError(ctx, err)
}
