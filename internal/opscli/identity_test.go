// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func TestIdentity(t *testing.T) {
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(d)) }
	for _, tt := range []struct {
		name string
		i    *opsv1.Identity
		want []string // in this order
	}{
		{"off", nil, []string{"none, commands come over this socket only"}},
		{"from files", &opsv1.Identity{Source: "files", ExpireTime: at(time.Hour)},
			[]string{"certificate until ", ", from files"}},
		{"from the controller", &opsv1.Identity{Source: "controller", ExpireTime: at(time.Hour),
			RenewTime: at(time.Minute)}, []string{"certificate until ", ", from the controller, renewed from "}},
		{"none yet", &opsv1.Identity{Source: "controller", Problem: "no controller", Since: at(-time.Hour),
			RetryTime: at(time.Minute)},
			[]string{"no certificate yet, from the controller; PROBLEM since ", ": no controller (tried again at "}},
		{"expired", &opsv1.Identity{Source: "files", ExpireTime: at(-time.Hour)}, []string{"certificate EXPIRED "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := opscli.Identity(tt.i)
			rest := got
			for _, w := range tt.want {
				_, after, found := strings.Cut(rest, w)
				if !found {
					t.Fatalf("%q, want %q in it", got, w)
				}
				rest = after
			}
		})
	}
}
