// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"context"
	"crypto/sha256"
	"testing"

	"github.com/cri-proxy/cri-proxy/proxy"
	"google.golang.org/grpc"
)

func sum(b []byte) [32]byte { return sha256.Sum256(b) }

func TestSameForEveryKindOfMethod(t *testing.T) {
	b := newBed(t, proxy.Options{})
	for _, method := range []string{methodVersion, methodEvents, methodList, methodNew, methodAlien} {
		t.Run(method, func(t *testing.T) {
			b.same(t, func(ctx context.Context, conn *grpc.ClientConn, _ *seen) *seen {
				return exchange(ctx, conn, method, []byte("ping"))
			})
		})
	}
}
