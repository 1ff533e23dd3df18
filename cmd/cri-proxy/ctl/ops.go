// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func (c *ctl) ops() *cobra.Command {
	var active, watch bool
	cmd := &cobra.Command{
		Use:               "ops [UID]",
		Short:             "List operations, newest first, or show one",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeUIDs(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			p := c.printer(cmd)
			switch {
			case len(args) == 1 && active:
				return usage("--active is for the list of operations, leave the UID out")
			case len(args) == 1 && watch:
				return c.client.Watch(ctx, p, args[0])
			case watch:
				return c.client.WatchList(ctx, p, active)
			}
			return c.client.Ops(ctx, func(ctx context.Context, client opsv1.OpsClient) error {
				if len(args) == 1 {
					op, err := client.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: args[0]})
					if err != nil {
						return err
					}
					return p.Operation(op)
				}
				list, err := client.ListOperations(ctx, &opsv1.ListOperationsRequest{ActiveOnly: active})
				if err != nil {
					return err
				}
				return p.Operations(list)
			})
		},
	}
	cmd.Flags().BoolVar(&active, "active", false, "list only operations that have not finished")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "follow the list or, with a UID, the operation until it ends")
	return cmd
}

func (c *ctl) cancel() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "cancel UID",
		Short: "Cancel an operation that has not stopped a container yet",
		Long: `Cancel an operation that has not stopped a container yet, and remove what it has
prepared. An image update can be cancelled until kubelet begins to stop the container,
so not after the pod has been patched. The pulled image stays on the node.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeUIDs(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.onOps(cmd, func(ctx context.Context, client opsv1.OpsClient) error {
				op, err := client.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: args[0], Reason: reason})
				if err != nil {
					return err
				}
				return c.printer(cmd).Operation(op)
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "cancelled by "+opscli.Requester(), "reason to put into the "+
		"operation's message")
	return cmd
}

// completeUIDs completes the UIDs of the daemon's operations.
func (c *ctl) completeUIDs(active bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return offer(cmd, func() (found []cobra.Completion, err error) {
			err = c.onOps(cmd, func(ctx context.Context, client opsv1.OpsClient) error {
				l, err := client.ListOperations(ctx, &opsv1.ListOperationsRequest{ActiveOnly: active})
				for _, op := range l.GetOperations() {
					found = append(found, cobra.CompletionWithDesc(op.GetUid(), opscli.Describe(op)))
				}
				return err
			})
			return found, err
		})
	}
}
