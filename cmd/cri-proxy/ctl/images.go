// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func (c *ctl) pulls() *cobra.Command {
	var active bool
	var cancelIt bool
	cmd := &cobra.Command{
		Use:   "pulls [UID]",
		Short: "List pre-pulls, newest first, or show one",
		Args:  cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeImages(func(ctx context.Context, client opsv1.ImagesClient) (completions, error) {
			l, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{ActiveOnly: active || cancelIt})
			var found completions
			for _, op := range l.GetPulls() {
				found = append(found, cobra.CompletionWithDesc(op.GetUid(), opscli.DescribePull(op)))
			}
			return found, err
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 1 && active:
				return usage("--active is for the list of pulls, leave the UID out")
			case len(args) == 0 && cancelIt:
				return usage("which pull is to be cancelled? give its UID")
			}
			return c.onImages(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				if len(args) == 0 {
					l, err := client.ListPulls(ctx, &opsv1.ListPullsRequest{ActiveOnly: active})
					if err != nil {
						return err
					}
					return c.printer(cmd).Pulls(l)
				}
				op, err := client.GetPull(ctx, &opsv1.GetPullRequest{Uid: args[0]})
				if err == nil && cancelIt {
					op, err = client.CancelPull(ctx, &opsv1.CancelPullRequest{
						Uid: args[0], Reason: "cancelled by " + opscli.Requester(),
					})
				}
				if err != nil {
					return err
				}
				return c.printer(cmd).Pull(op)
			})
		},
	}
	cmd.Flags().BoolVar(&active, "active", false, "list only pulls that have not finished")
	cmd.Flags().BoolVar(&cancelIt, "cancel", false, "cancel the pull; the node keeps for an hour what it has fetched")
	return cmd
}

func (c *ctl) images() *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "List pre-pulled images, and until when and for whom they are pinned",
		Long: `List the pinned images. A pin keeps an image from kubelet's image garbage collection
until a time, for an owner. Images that were pre-pulled in the last hour without a pin
are listed too. <gone> marks an image that was removed from the node. If it comes back
before its pin ends, it is pinned again.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.onImages(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				return c.printer(cmd).PinnedImages(ctx, client)
			})
		},
	}
}

func (c *ctl) unpin() *cobra.Command {
	return &cobra.Command{
		Use:   "unpin OWNER|IMAGE",
		Short: "Remove the pins of an owner, or all pins of an image",
		Long: `Remove the pins of an owner, or all pins of an image. The image stays until kubelet
removes it, which kubelet may do when the disk is full.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usage("name an owner or an image, as cri-proxy ctl images shows them")
			}
			return nil
		},
		ValidArgsFunction: c.completeImages(func(ctx context.Context, client opsv1.ImagesClient) (completions, error) {
			l, err := client.ListPins(ctx, &opsv1.ListPinsRequest{})
			var found completions
			for _, p := range l.GetPins() {
				found = append(found,
					cobra.CompletionWithDesc(p.GetOwner(), "owner"), cobra.CompletionWithDesc(p.GetImage(), "image"))
			}
			slices.Sort(found)
			return slices.Compact(found), err
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.onImages(cmd, func(ctx context.Context, client opsv1.ImagesClient) error {
				return c.printer(cmd).Unpin(ctx, client, args[0])
			})
		},
	}
}

// completions is [cobra.Completion], more than one.
type completions = []cobra.Completion

// completeImages completes the first argument with what ask returns.
func (c *ctl) completeImages(ask func(context.Context, opsv1.ImagesClient) (completions, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return offer(cmd, func() (found []cobra.Completion, err error) {
			err = c.onImages(cmd, func(ctx context.Context, client opsv1.ImagesClient) (err error) {
				found, err = ask(ctx, client)
				return err
			})
			return found, err
		})
	}
}
