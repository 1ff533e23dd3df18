// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	protocodec "google.golang.org/grpc/encoding/proto"
)

// frame is one message as it came off the wire. It owns one reference to each
// of its buffers until it is marshalled or freed.
type frame struct {
	data mem.BufferSlice
}

// newFrame makes a frame of bytes that nobody will change any more.
func newFrame(b []byte) *frame {
	return &frame{data: mem.BufferSlice{mem.SliceBuffer(b)}}
}

// free gives the buffers back. A frame that gRPC has marshalled is empty, so
// freeing it again is safe; every path that may have skipped the send does.
func (f *frame) free() {
	if f.data != nil {
		f.data.Free()
		f.data = nil
	}
}

// rawCodec hands frames through without looking inside and leaves every other
// type to the protobuf codec, so that typed services and typed clients work
// beside the proxied calls.
type rawCodec struct {
	typed encoding.CodecV2
}

var _ encoding.CodecV2 = rawCodec{}

func newRawCodec() rawCodec {
	return rawCodec{typed: encoding.GetCodecV2(protocodec.Name)}
}

// Marshal hands the frame's own references to gRPC, which frees them.
func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return c.typed.Marshal(v)
	}
	data := f.data
	f.data = nil
	return data, nil
}

// Unmarshal takes references of its own: gRPC frees data on return.
func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return c.typed.Unmarshal(data, v)
	}
	f.free() // a peer that answers a unary call twice
	data.Ref()
	f.data = data
	return nil
}

// Name is empty so that the content type stays the plain application/grpc that
// kubelet sends. A name of its own would become a content subtype, which
// servers warn about today and are announced to refuse.
func (rawCodec) Name() string { return "" }
