// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func (c *ctl) pull() *cobra.Command {
	var o opscli.PullOptions
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pre-pull an image onto this node",
		Long: `Pre-pull an image: pull it onto this node before a pod needs it.

By default the node pre-pulls one image at a time. While kubelet's own pulls receive
bytes, a pre-pull waits, for two minutes at most. Bytes that an interrupted pull has
fetched are kept for an hour, and not fetched again.

The daemon keeps the credentials of --auth-file in memory only.

^C cancels the pull; a second ^C returns without waiting for its end. The exit code is
1 if the node does not have the image in the end. With -o json or yaml the command
prints only the result.`,
		Example: `  cri-proxy ctl pull nginx:1.29 --limit 20MiB/s
  cri-proxy ctl pull registry.example/team/app@sha256:... --auth-file ~/.docker/config.json --pin 24h`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one image: cri-proxy ctl pull IMAGE")
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.Run(cmd.Context(), c.client, c.printer(cmd), args[0])
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&o.AuthFile, "auth-file", "", authFileUsage)
	fs.Var(&o.Limit, "limit", "speed limit, such as 20MiB/s (default: the node's limit, or none)")
	fs.DurationVar(&o.Pin, "pin", 0, "how long to keep the image from kubelet's image garbage collection "+
		"(default: no pin)")
	fs.BoolVar(&o.Always, "always", false, "ask the registry even if the node has the image")
	fs.StringVar(&o.RuntimeHandler, "runtime-handler", "",
		"runtime handler, as in a RuntimeClass, whose snapshotter gets the image (default: the runtime's default)")
	fs.Int32Var(&o.Attempts, "attempts", 0, "maximum number of attempts (default: 4)")
	fs.DurationVar(&o.Timeout, "timeout", 0, "maximum time of each attempt (default: 10m)")
	fs.DurationVar(&o.Deadline, "deadline", 0, "maximum time of the pull, waiting included (default: none)")
	fs.StringVar(&o.UID, "uid", "", "UID of the pull; the same UID never pulls twice (default: a new one)")
	fs.BoolVar(&o.NoWait, "no-wait", false, "return when the daemon has accepted the pull")
	_ = cmd.MarkFlagFilename("auth-file", "json") // fails for an unknown flag only
	return cmd
}
