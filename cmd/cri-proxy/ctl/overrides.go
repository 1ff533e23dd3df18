// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// completeOverridden completes what can be reverted, of which word makes the word that is completed.
func (c *ctl) completeOverridden(f *restartFlags, word func(args []string, o *opsv1.ImageOverride) string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if !f.revert {
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
		call, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		l, err := client.ListOverrides(call, &opsv1.ListOverridesRequest{})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
		}
		var found []cobra.Completion
		for _, o := range l.GetOverrides() {
			if w := word(args, o); w != "" {
				found = append(found, cobra.CompletionWithDesc(w, o.GetImage()))
			}
		}
		return found, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

func (c *ctl) overrides() *cobra.Command {
	return &cobra.Command{
		Use:   "overrides",
		Short: "Show the containers that run another image than the one in their pod's spec",
		Long: `Show the containers that run another image than the one in their pod's spec, since
cri-proxy ctl restart --image. kubelet makes them with that image too, until
cri-proxy ctl restart --revert-image, or until the spec gets another image, or the
pod is gone.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			client, closeConn, err := c.dial(ctx)
			if err != nil {
				return err
			}
			defer closeConn()
			call, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			l, err := client.ListOverrides(call, &opsv1.ListOverridesRequest{})
			if err != nil {
				return plain(err)
			}
			out := cmd.OutOrStdout()
			if c.output.structured() {
				return c.print(out, l)
			}
			if len(l.GetOverrides()) == 0 {
				_, err := fmt.Fprintln(out, "No overrides.")
				return err
			}
			columns := []string{"POD", "CONTAINER", "IMAGE", "SPEC IMAGE", "AGE"}
			if c.output == wide {
				columns = append(columns, "IMAGE ID", "POD UID", "OPERATION", "REQUESTER")
			}
			t := newTable(out, columns...)
			for _, o := range l.GetOverrides() {
				row := []string{podName(o.GetPod()), o.GetContainer(), o.GetImage(), o.GetSpecImage(), c.age(o.GetSince())}
				if c.output == wide {
					row = append(row, imageID(o.GetImageId()), o.GetPod().GetUid(), o.GetOperationUid(), o.GetRequester())
				}
				t.row(row...)
			}
			return t.flush()
		},
	}
}
