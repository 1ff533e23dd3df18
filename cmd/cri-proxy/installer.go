// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/systemd/node/installer"
)

// newInstaller is for pods only.
func newInstaller() *cobra.Command {
	cmd := &cobra.Command{
		Use:    "installer",
		Short:  "Run cri-proxy install on the node of this privileged pod",
		Hidden: true,
		Long: `Run cri-proxy install or uninstall on the node of this pod, and label the node. The
process then stays until it is told to stop, even if the command has failed: a new pod
is a new attempt. The pod must be privileged and must see the node's processes
(hostPID). See deploy/installer.`,
	}
	for action, short := range map[string]string{
		installer.Check:     "Print what cri-proxy install would do",
		installer.Install:   "Run cri-proxy install",
		installer.Uninstall: "Run cri-proxy uninstall",
	} {
		cmd.AddCommand(newInstallerAction(action, short))
	}
	cmd.AddCommand(&cobra.Command{
		Use: "done FILE", Short: "Exit with 0 if FILE exists, " +
			"which means that the node is done", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			_, err := os.Stat(args[0])
			return err
		},
	})
	return cmd
}

func newInstallerAction(action, short string) *cobra.Command {
	o := installer.Options{Action: action, LeftOver: leftOver}
	var more string
	cmd := &cobra.Command{
		Use: action, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			o.Out, o.Args = cmd.OutOrStdout(), strings.Fields(more)
			return installer.Run(ctx, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Host, "host", "/proc/1/root", "root directory of the node's files")
	f.StringVar(&o.Node, "node", "", "name of the node to label (default: set no label)")
	f.StringVar(&o.Done, "done", "", "file to write when the node is done, for a readiness probe")
	f.StringVar(&more, "args", "", "additional arguments for cri-proxy install or uninstall, separated by spaces")
	return cmd
}
