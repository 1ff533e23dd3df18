// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

func newSelfUpdate() *cobra.Command {
	o := update.Options{}
	cmd := &cobra.Command{
		Use:     "self-update",
		Aliases: []string{"upgrade"}, // its name until 0.1.0
		Short:   "Replace the running version of cri-proxy without a failed call",
		Long: `Replace the running version of cri-proxy: start the idle instance of
cri-proxy@.service with the new binary, which takes over. Long calls, such as image
pulls, end in the old instance. If the new instance does not get as far as serving,
the old one keeps serving as if nothing had happened.

Where no instance runs, the command installs the binary and starts it. With --reload
the same version takes over from itself, and so reads a changed configuration.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			o.Out = c.OutOrStdout()
			if o.Prefix, err = update.ReadPrefix(update.PrefixFile); err != nil {
				return err
			}
			return update.Run(c.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Binary, "binary", "", "binary of the new version (default: this program)")
	f.BoolVar(&o.Back, "back", false, "go back to the previous version")
	f.BoolVar(&o.EndDrain, "end-drain", false, "cut the calls that still run in the old instance since the last update")
	f.BoolVar(&o.Reload, "reload", false,
		"take over even if this version runs already, to apply a changed configuration or unit")
	f.StringVar(&o.Config, "config", config.DefaultFile, "configuration file of the daemon")
	f.DurationVar(&o.Timeout, "timeout", update.DefaultTimeout,
		"maximum time until the new instance serves; the takeover waits for operations that stop containers")
	cmd.MarkFlagsMutuallyExclusive("binary", "back")
	cmd.MarkFlagsMutuallyExclusive("reload", "back")
	return cmd
}
