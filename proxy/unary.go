// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"time"

	"google.golang.org/grpc"
)

// unary relays one request and one answer.
func (c *call) unary() error {
	take, done := c.directUnary()
	if done != nil {
		defer done()
	}
	var req frame
	if over, err := c.receiveOnly(&req); over {
		return err
	}
	if take != nil {
		return c.interceptUnary(take, &req)
	}
	return c.passUnary(&req)
}

// passUnary forwards req, undecoded, and answers what the runtime answers.
func (c *call) passUnary(req *frame) error {
	var resp frame
	c.s.inflight.forwarded(c)
	err := c.invoke(c.client.Context(), req, &resp)
	return c.answer(&resp, err)
}

// invoke makes the upstream call and keeps its header and trailer. It frees req
// in any case; resp is the caller's.
func (c *call) invoke(ctx context.Context, req, resp *frame) error {
	defer req.free()
	if c.probe {
		return nil
	}
	c.header, c.trailer = nil, nil
	opts := append(c.callOptions(), grpc.Header(&c.header), grpc.Trailer(&c.trailer))
	began := time.Now()
	err := c.conn.Invoke(c.outgoing(ctx), c.name, req, resp, opts...)
	c.upstream += time.Since(began)
	return connectionError(err)
}

// bareHeader is the size of a header without metadata: the content type alone.
const bareHeader = 1

// answer sends header, message, trailer and status as they are. An answer
// without header was trailers-only and stays so.
func (c *call) answer(resp *frame, err error) error {
	defer resp.free()
	// A message brings the header along by itself, an error does not.
	if c.header != nil && (err != nil || len(c.header) > bareHeader) {
		_ = c.client.SetHeader(c.header) // fails only if the call is over
	}
	if len(c.trailer) > 0 {
		c.client.SetTrailer(c.trailer)
	}
	if err != nil {
		return err
	}
	return c.send(resp)
}
