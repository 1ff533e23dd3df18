// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// decode fills m from an encoded message; its error makes the proxy pass the call.
func decode[M proto.Message](b []byte, m M) (M, error) {
	if err := proto.Unmarshal(b, m); err != nil {
		return m, &proxy.PassError{Err: fmt.Errorf("decoding %s: %w", m.ProtoReflect().Descriptor().FullName(), err)}
	}
	return m, nil
}

func encode(m proto.Message) ([]byte, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, &proxy.PassError{Err: fmt.Errorf("encoding %s: %w", m.ProtoReflect().Descriptor().FullName(), err)}
	}
	return b, nil
}

// forward sends req on, decodes the answer into resp, lets change edit it and encodes it again.
func forward[M proto.Message](
	ctx context.Context, req []byte, next proxy.UnaryNext, resp M, change func(M),
) ([]byte, error) {
	b, err := next(ctx, req)
	if err != nil {
		return nil, err
	}
	if _, err := decode(b, resp); err != nil {
		return nil, err
	}
	change(resp)
	return encode(resp)
}

// notFound is containerd's own answer for a container that it does not know
// (internal/cri/server/container_status.go), so that nobody can tell a hidden one from none.
func notFound(id string) error {
	return status.Errorf(codes.NotFound, "an error occurred when try to find container %q: not found", id)
}

// without returns s without the elements that drop reports. It reuses s.
func without[T any](s []T, drop func(T) bool) []T {
	kept := s[:0]
	for _, e := range s {
		if !drop(e) {
			kept = append(kept, e)
		}
	}
	return kept
}
