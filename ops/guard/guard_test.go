// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package guard_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/ops/guard"
)

func TestTry(t *testing.T) {
	var out bytes.Buffer
	log := logrus.New()
	log.SetOutput(&out)
	var p *guard.Panic
	if err := guard.Try(log, func() error { panic("the reason") }); !errors.As(err, &p) || p.Value != "the reason" ||
		!strings.Contains(err.Error(), "the reason") {
		t.Errorf("got %v", err)
	}
	if s := out.String(); !strings.Contains(s, "the reason") || !strings.Contains(s, "TestTry") {
		t.Errorf("the log has no stack: %s", s)
	}
	some := errors.New("some")
	if err := guard.Try(log, func() error { return some }); !errors.Is(err, some) {
		t.Errorf("got %v", err)
	}
	if !guard.Do(log, func() {}) || guard.Do(log, func() { panic(1) }) {
		t.Error("Do tells the wrong end")
	}
}

func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		n := 0
		guard.Keep(t.Context(), log, func() {
			if n++; n < 3 {
				panic(n)
			}
		})
		if n != 3 {
			t.Errorf("run %d times", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		guard.Keep(ctx, log, func() {
			cancel()
			panic("the last")
		})
	})
}
