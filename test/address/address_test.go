// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package address_test

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"github.com/cri-proxy/cri-proxy/test/address"
)

func TestReserve(t *testing.T) {
	a := address.Reserve(t)
	refused := func() {
		t.Helper()
		if c, err := net.Dial("tcp", a); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connected to %v, error %v", c, err)
		}
	}
	for range 3 {
		refused()
		if l, err := net.Listen("tcp", a); err == nil {
			_ = l.Close()
			t.Error("somebody else gets it")
		}
		l := address.Listen(t, a)
		c, err := net.Dial("tcp", a)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		_ = l.Close()
	}
	refused()
}
