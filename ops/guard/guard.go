// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package guard

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"
)

// Panic is what becomes of a panic.
type Panic struct{ Value any }

func (p *Panic) Error() string {
	return fmt.Sprintf("cri-proxy met a bug of its own (%v); its log says where, please report it", p.Value)
}

// Try returns f's error, or the panic that it met as a [*Panic], which is logged with its stack.
func Try(log logrus.FieldLogger, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.WithFields(logrus.Fields{"panic": p, "stack": string(debug.Stack())}).
				Error("the daemon would have panicked; please report this")
			err = &Panic{Value: p}
		}
	}()
	return f()
}

// Do is [Try] for what has no error. It reports whether f has come to its end.
func Do(log logrus.FieldLogger, f func()) bool {
	return Try(log, func() error { f(); return nil }) == nil
}

// pause is how long Keep waits after a panic. What is kept is not urgent, and the next time may be
// as bad.
const pause = time.Minute

// Keep runs f, which works until ctx ends, again after a panic. It returns when f does.
func Keep(ctx context.Context, log logrus.FieldLogger, f func()) {
	for !Do(log, f) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}
