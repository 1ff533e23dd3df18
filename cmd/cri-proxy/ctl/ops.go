// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// listInterval is how often `ctl ops --watch` asks for the list: there is a watch
// of one operation only, and people do not read faster.
const listInterval = time.Second

func (c *ctl) ops() *cobra.Command {
	var active, watch bool
	cmd := &cobra.Command{
		Use:               "ops [UID]",
		Short:             "Show operations, newest first, or one of them",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeUIDs(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			client, closeConn, err := c.dial(ctx)
			if err != nil {
				return err
			}
			defer closeConn()
			out := cmd.OutOrStdout()
			switch {
			case len(args) == 1 && active:
				return usage("--active is for the list of operations, leave the UID out")
			case len(args) == 1 && watch:
				return c.watch(ctx, out, client, args[0])
			case len(args) == 1:
				call, cancel := context.WithTimeout(ctx, callTimeout)
				defer cancel()
				op, err := client.GetOperation(call, &opsv1.GetOperationRequest{Uid: args[0]})
				if err != nil {
					return plain(err)
				}
				return c.printOperation(out, op)
			case watch:
				return c.watchList(ctx, out, client, active)
			}
			list, err := list(ctx, client, active)
			if err != nil {
				return err
			}
			return c.printList(out, list)
		},
	}
	cmd.Flags().BoolVar(&active, "active", false, "leave finished operations out")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "follow; with a UID to the operation's end")
	return cmd
}

func (c *ctl) cancel() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "cancel UID",
		Short: "Cancel an operation that has not stopped anything yet",
		Long: `Cancel an operation that has not stopped anything yet, and remove what it has
prepared. An upgrade can be cancelled until kubelet begins to stop the container,
so not after the pod has been patched; its image stays on the node.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeUIDs(true),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			client, closeConn, err := c.dial(ctx)
			if err != nil {
				return err
			}
			defer closeConn()
			call, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			op, err := client.CancelOperation(call, &opsv1.CancelOperationRequest{Uid: args[0], Reason: reason})
			if err != nil {
				return plain(err)
			}
			return c.printOperation(cmd.OutOrStdout(), op)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "cancelled by "+requester(), "goes into the operation's message")
	return cmd
}

func list(ctx context.Context, client opsv1.OpsClient, active bool) (*opsv1.ListOperationsResponse, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := client.ListOperations(call, &opsv1.ListOperationsRequest{ActiveOnly: active})
	return l, plain(err)
}

// watchList prints the list, then a row for each operation that is new or changed,
// until ctx ends.
func (c *ctl) watchList(ctx context.Context, out io.Writer, client opsv1.OpsClient, active bool) error {
	tick := time.NewTicker(listInterval)
	defer tick.Stop()
	shown := map[string]*opsv1.Operation{}
	t := newTable(out, c.listColumns()...)
	for {
		l, err := list(ctx, client, active)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		var changed []*opsv1.Operation
		present := map[string]*opsv1.Operation{}
		for _, op := range l.GetOperations() {
			if !proto.Equal(shown[op.GetUid()], op) {
				changed = append(changed, op)
			}
			present[op.GetUid()] = op
		}
		shown = present
		slices.Reverse(changed) // the newest last, as lines appear
		for _, op := range changed {
			if c.output.structured() {
				if err := c.print(out, op); err != nil {
					return err
				}
				continue
			}
			t.row(c.listRow(op)...)
		}
		if err := t.flush(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// completeUIDs completes the UIDs of the daemon's operations.
func (c *ctl) completeUIDs(active bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		client, closeConn, err := c.dial(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
		}
		defer closeConn()
		l, err := list(ctx, client, active)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
		}
		var found []cobra.Completion
		for _, op := range l.GetOperations() {
			found = append(found, cobra.CompletionWithDesc(op.GetUid(),
				fmt.Sprintf("%s %s %s", op.GetKind(), podName(op.GetPod()), phaseName(op.GetPhase()))))
		}
		return found, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

// outcome is the error of a finished operation, nil if it succeeded.
func outcome(op *opsv1.Operation) error {
	switch op.GetPhase() {
	case opsv1.Phase_PHASE_SUCCEEDED:
		return nil
	case opsv1.Phase_PHASE_CANCELLED:
		return fmt.Errorf("operation %s was cancelled: %s", op.GetUid(), op.GetMessage())
	}
	if op.GetMessage() == "" {
		return fmt.Errorf("operation %s: %w", op.GetUid(), errors.New("failed"))
	}
	return fmt.Errorf("operation %s: %s", op.GetUid(), op.GetMessage())
}
