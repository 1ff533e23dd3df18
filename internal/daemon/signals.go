// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"os"
	"os/signal"
	"sync"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Signals returns a context that ends with the first SIGTERM or SIGINT, and one that ends with the
// second.
func Signals(log logrus.FieldLogger) (graceful, hard context.Context, end func()) {
	graceful, stop := context.WithCancel(context.Background())
	hard, kill := context.WithCancel(context.Background())
	c := make(chan os.Signal, 2)
	signal.Notify(c, unix.SIGTERM, unix.SIGINT)
	over := make(chan struct{})
	var owned sync.WaitGroup
	owned.Go(func() {
		for _, next := range []struct {
			cancel context.CancelFunc
			does   string
		}{{stop, "draining; once more stops at once"}, {kill, "stopping at once"}} {
			select {
			case s := <-c:
				log.WithField("signal", s.String()).Info(next.does)
				next.cancel()
			case <-over:
				return
			}
		}
	})
	return graceful, hard, func() {
		signal.Stop(c)
		close(over)
		owned.Wait()
		stop()
		kill()
	}
}
