// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

// completeOverridden completes pods and containers that --revert-image is for. word returns the
// word for an override, empty for none.
func (c *ctl) completeOverridden(
	f *opscli.RestartOptions, word func(args []string, o *opsv1.ImageOverride) string,
) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if !f.RevertImage {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return offer(cmd, func() (found []cobra.Completion, err error) {
			l, err := c.listOverrides(cmd)
			for _, o := range l.GetOverrides() {
				if w := word(args, o); w != "" {
					found = append(found, cobra.CompletionWithDesc(w, o.GetImage()))
				}
			}
			return found, err
		})
	}
}

func (c *ctl) listOverrides(cmd *cobra.Command) (l *opsv1.ListOverridesResponse, err error) {
	err = c.onOps(cmd, func(ctx context.Context, client opsv1.OpsClient) (err error) {
		l, err = client.ListOverrides(ctx, &opsv1.ListOverridesRequest{})
		return err
	})
	return l, err
}

func (c *ctl) overrides() *cobra.Command {
	return &cobra.Command{
		Use:   "overrides",
		Short: "List containers that run another image than their pod's spec has",
		Long: `List containers that run another image than their pod's spec has, because of
cri-proxy ctl restart --image. kubelet creates them with that image too. An override
ends with cri-proxy ctl restart --revert-image, when the image in the spec changes, or
when the pod is gone.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := c.listOverrides(cmd)
			if err != nil {
				return err
			}
			return c.printer(cmd).Overrides(l)
		},
	}
}
