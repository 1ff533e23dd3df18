// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// Command returns `cri-proxy serve`.
func Command() *cobra.Command {
	c := config.Default()
	var file string
	var printOnly bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Relay CRI calls between kubelet and the container runtime",
		Long: `Relay CRI calls between kubelet and the container runtime, and restart
containers in place on command.

Settings come from the file given with --config and from flags; flags win.
SIGTERM and SIGINT drain: calls in flight end by themselves, for at most
--drain-timeout. A second signal stops at once.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.Load(file, cmd.Flags()); err != nil {
				return err
			}
			if err := c.Complete(); err != nil {
				return &config.InvalidError{Err: err}
			}
			if err := c.Validate(); err != nil {
				return &config.InvalidError{Err: fmt.Errorf("configuration: %w", err)}
			}
			if printOnly {
				b, err := c.YAML()
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(b)
				return err
			}
			log, err := newLogger(c.Log, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			proxy.LimitProcs()
			graceful, hard, end := signals(log)
			defer end()
			return Run(graceful, hard, c, log)
		},
	}
	c.Flags(cmd.Flags())
	cmd.Flags().StringVar(&file, "config", "", "YAML file with settings")
	cmd.Flags().BoolVar(&printOnly, "print-config", false, "print the settings in force as YAML and exit")
	return cmd
}

// signals returns a context that ends with the first SIGTERM or SIGINT and one
// that ends with the second.
func signals(log logrus.FieldLogger) (graceful, hard context.Context, end func()) {
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
