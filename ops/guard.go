// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"runtime/debug"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Guard turns a panic of a command into an error: kubelet's calls are served by the same process,
// and have nothing to do with it.
func Guard(log logrus.FieldLogger) []grpc.ServerOption {
	caught := func(method string, err *error) {
		if p := recover(); p != nil {
			log.WithFields(logrus.Fields{"method": method, "panic": p, "stack": string(debug.Stack())}).
				Error("a command made the daemon panic; please report this")
			*err = status.Error(codes.Internal, "the daemon met a bug of its own; its log says where")
		}
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo,
			handler grpc.UnaryHandler) (resp any, err error) {
			defer caught(info.FullMethod, &err)
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo,
			handler grpc.StreamHandler) (err error) {
			defer caught(info.FullMethod, &err)
			return handler(srv, s)
		}),
	}
}
