// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"time"

	"github.com/spf13/cobra"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

// Usage texts of flags that several commands have.
const (
	orderUsage = "StopFirst, or StartFirst to start the new container before the old one stops; " +
		"StartFirst needs an application that shares its port (SO_REUSEPORT) or has none"
	authFileUsage = "docker config file with registry credentials, such as ~/.docker/config.json"
)

func (c *ctl) restart() *cobra.Command {
	var o opscli.RestartOptions
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "restart NAMESPACE/POD -c NAME [-c NAME...]",
		Short: "Restart containers of a pod in place",
		Long: `Restart containers of a pod in place: each gets a new container in the same pod, with
the same IP address and volumes. It works for every restartPolicy, and without back-off.

The pod's preStop hooks run. Its postStart hooks do not: the node knows them only from
a ContainerRecreateRequest. The same is true of changed ConfigMaps, Secrets,
annotations and Services: the new container gets the environment of the last start.
A ContainerRecreateRequest applies the changes.

--image starts the new container with another image than the pod's spec has, to try
the image out. kubelet keeps using that image for this container until --revert-image,
or until the image in the spec changes. The pod's status shows the image; the API
server is not asked. cri-proxy ctl overrides lists such containers. The daemon keeps
the credentials of --auth-file in memory only.

Without --watch the command returns when the operation is in the daemon's journal. The
operation then runs to its end, whatever happens. With --watch the exit code is 1 if
the operation does not succeed.`,
		Example: `  cri-proxy ctl restart default/web -c app --watch
  cri-proxy ctl restart default/web -c app -c sidecar --ordered --grace 10s
  cri-proxy ctl restart default/web -c app --image registry.example/app:debug --watch
  cri-proxy ctl restart default/web -c app --revert-image`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one pod: cri-proxy ctl restart NAMESPACE/POD -c NAME")
			}
			return nil
		},
		ValidArgsFunction: c.completeOverridden(&o, func(_ []string, o *opsv1.ImageOverride) string {
			return podOf(o)
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("grace") {
				o.Grace = &grace
			}
			ctx, stop := interruptible(cmd)
			defer stop()
			return o.Run(ctx, c.client, c.printer(cmd), args[0])
		},
	}
	fs := cmd.Flags()
	fs.StringArrayVarP(&o.Containers, "container", "c", nil, "name of a container to restart; may be repeated")
	fs.DurationVar(&grace, "grace", 0, "grace period for preStop hook and stop together, "+
		"in whole seconds (default: the pod's)")
	fs.BoolVar(&o.Ordered, "ordered", false,
		"restart the containers one after another, in the order given, and stop at the first failure")
	fs.StringVar(&o.Order, "order", opscli.StopFirst, orderUsage)
	fs.DurationVar(&o.MinReady, "min-ready", 0,
		"with StartFirst: how long the new container must run before the old one is stopped, in whole seconds")
	fs.BoolVar(&o.Force, "force", false, "restart even if the container is no longer the expected one")
	fs.StringArrayVar(&o.Expect, "expect", nil,
		"ID that the running container must have, else refuse; for several containers repeat NAME=ID")
	fs.StringVar(&o.UID, "uid", "", "UID of the operation; the same UID never restarts twice (default: a new one)")
	fs.BoolVarP(&o.Watch, "watch", "w", false, "follow the operation until it ends")
	fs.DurationVar(&o.Timeout, "timeout", 0, "maximum time to wait; the operation goes on (default: no limit)")
	fs.StringVar(&o.Image, "image", "", "run this image instead of the one in the pod's spec, until --revert-image")
	fs.BoolVar(&o.RevertImage, "revert-image", false, "return to the image in the pod's spec")
	fs.BoolVar(&o.Always, "always", false, "ask the registry even if the node has the image")
	fs.StringVar(&o.AuthFile, "auth-file", "", authFileUsage)
	// These fail for an unknown flag only.
	_ = cmd.MarkFlagFilename("auth-file", "json")
	_ = cmd.RegisterFlagCompletionFunc("image", cobra.NoFileCompletions)
	containerOf := func(args []string, o *opsv1.ImageOverride) string {
		if len(args) == 1 && args[0] == podOf(o) {
			return o.GetContainer()
		}
		return ""
	}
	_ = cmd.RegisterFlagCompletionFunc("container", c.completeOverridden(&o, containerOf))
	_ = cmd.RegisterFlagCompletionFunc("order", completeOrder())
	return cmd
}

func podOf(o *opsv1.ImageOverride) string {
	return o.GetPod().GetNamespace() + "/" + o.GetPod().GetName()
}

func completeOrder() cobra.CompletionFunc {
	return cobra.FixedCompletions([]string{opscli.StopFirst, opscli.StartFirst}, cobra.ShellCompDirectiveNoFileComp)
}
