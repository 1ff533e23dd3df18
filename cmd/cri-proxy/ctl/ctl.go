// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

// ctl has what the commands share.
type ctl struct {
	client opscli.Client
	format opscli.Format
	// now is the clock for ages.
	now func() time.Time
}

// Command returns `cri-proxy ctl`. now is the clock for ages.
func Command(now func() time.Time) *cobra.Command {
	c := &ctl{format: opscli.Table, now: now}
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Send commands to the daemon of this node",
	}
	socket := os.Getenv(opscli.SocketVariable)
	if socket == "" {
		socket = config.DefaultAdminSocket
	}
	cmd.PersistentFlags().StringVar(&c.client.Socket, "admin-socket", socket,
		"admin socket of the daemon; the default is $"+opscli.SocketVariable+" if it is set")
	cmd.PersistentFlags().VarP(&c.format, "output", "o", "output format: table, wide, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output",
		cobra.FixedCompletions(opscli.Formats(), cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(
		c.restart(), c.overrides(), c.setImage(), c.ops(), c.cancel(), c.pull(), c.pulls(), c.images(), c.unpin(),
		c.status(), c.doctor(), c.profile(), c.version(),
	)
	return cmd
}

func (c *ctl) printer(cmd *cobra.Command) *opscli.Printer {
	return &opscli.Printer{Out: cmd.OutOrStdout(), Format: c.format, Now: c.now}
}

// interruptible returns a context that ends with SIGINT or SIGTERM too.
func interruptible(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
}

// onOps calls f with a client of the commands for containers.
func (c *ctl) onOps(cmd *cobra.Command, f func(context.Context, opsv1.OpsClient) error) error {
	ctx, stop := interruptible(cmd)
	defer stop()
	return c.client.Ops(ctx, f)
}

// onImages calls f with a client of the commands for images.
func (c *ctl) onImages(cmd *cobra.Command, f func(context.Context, opsv1.ImagesClient) error) error {
	ctx, stop := interruptible(cmd)
	defer stop()
	return c.client.Images(ctx, f)
}

// offer completes a word with what the daemon knows.
func offer(cmd *cobra.Command, ask func() ([]cobra.Completion, error)) ([]cobra.Completion, cobra.ShellCompDirective) {
	if cmd.Context() == nil {
		cmd.SetContext(context.Background())
	}
	found, err := ask()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
	}
	return found, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// usage is an error of the command line itself.
func usage(format string, args ...any) error {
	return &config.InvalidError{Err: fmt.Errorf(format, args...)}
}
