// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

func (c *ctl) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the state of the daemon, of its runtime and of kubelet's connection",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info, err := c.info(cmd)
			if err != nil {
				return err
			}
			return c.printer(cmd).NodeInfo(info)
		},
	}
}

func (c *ctl) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this binary and of the daemon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			if _, err := fmt.Fprintf(out, "Client: %s\n", version.Short()); err != nil {
				return err
			}
			info, err := c.info(cmd)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "Daemon: %s\n", info.GetVersion())
			return err
		},
	}
}

func (c *ctl) info(cmd *cobra.Command) (info *opsv1.NodeInfoResponse, err error) {
	err = c.onOps(cmd, func(ctx context.Context, client opsv1.OpsClient) (err error) {
		info, err = client.NodeInfo(ctx, &opsv1.NodeInfoRequest{})
		return err
	})
	return info, err
}
