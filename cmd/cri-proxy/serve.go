// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/daemon"
	"github.com/cri-proxy/cri-proxy/proxy"
)

func newServe() *cobra.Command {
	c := config.Default()
	var file string
	var printOnly bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Relay CRI calls between kubelet and the container runtime",
		Long: `Relay CRI calls between kubelet and the container runtime, and run operations on
containers: restarts, image updates and pre-pulls.

Settings come from the file of --config and from flags. Flags override the file.

On SIGTERM or SIGINT the daemon drains: it waits for calls in flight, at most for
--drain-timeout. A second signal stops it at once.`,
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
			log, err := daemon.NewLogger(c.Log, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			proxy.LimitProcs()
			graceful, hard, end := daemon.Signals(log)
			defer end()
			return daemon.Run(graceful, hard, c, log)
		},
	}
	c.Flags(cmd.Flags())
	cmd.Flags().StringVar(&file, "config", "", "YAML configuration file")
	cmd.Flags().BoolVar(&printOnly, "print-config", false, "print the effective configuration as YAML and exit")
	return cmd
}
