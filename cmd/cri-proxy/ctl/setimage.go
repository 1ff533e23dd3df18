// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func (c *ctl) setImage() *cobra.Command {
	var o opscli.SetImageOptions
	cmd := &cobra.Command{
		Use:     "set-image NAMESPACE/POD -c NAME=IMAGE [-c NAME=IMAGE...]",
		Aliases: []string{"upgrade"}, // its name until 0.1.0
		Short:   "Prepare new images for containers of a pod",
		Long: `Prepare new images for containers of a pod: pull the images, check them, and create the
new containers while the old ones keep running. Then the command prints the kubectl set
image command for the pod. When you run it, the new containers take over within
milliseconds. For kubelet and the pod this is an ordinary change of image.

IMAGE must be exactly the text that the pod's spec will have. If the pod belongs to a
workload, the workload's template does not change: pods that it creates later have the
old image. An InPlaceRollout changes both.

The daemon keeps the credentials of --auth-file in memory only.

^C before kubectl set image undoes everything. The exit code is 1 if the containers
could not be prepared, or, with --watch, if they have not taken over.`,
		Example: `  cri-proxy ctl set-image default/web -c app=registry.example/app:v2 --watch
  cri-proxy ctl set-image default/web -c app=registry.example/app:v2 --order StartFirst --min-ready 5s
  cri-proxy ctl cancel UID`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one pod: cri-proxy ctl set-image NAMESPACE/POD -c NAME=IMAGE")
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Again, o.People = again(cmd, args[0], o.Containers), cmd.ErrOrStderr()
			return o.Run(cmd.Context(), c.client, c.printer(cmd), args[0])
		},
	}
	fs := cmd.Flags()
	fs.StringArrayVarP(&o.Containers, "container", "c", nil, "name of a container and its new image; may be repeated")
	fs.StringVar(&o.Order, "order", opscli.StopFirst, orderUsage)
	fs.DurationVar(&o.MinReady, "min-ready", 0,
		"with StartFirst: how long the new container must run before it counts as ready, in whole seconds")
	fs.StringVar(&o.AuthFile, "auth-file", "", authFileUsage)
	fs.BoolVar(&o.Always, "always", false,
		"ask the registry even if the node has the image; for containers with imagePullPolicy Always")
	fs.DurationVar(&o.Pin, "pin", 0,
		"how long to keep the old and the new images from kubelet's image garbage collection (default: 24h)")
	fs.DurationVar(&o.PrepareTimeout, "prepare-timeout", 0, "maximum time for pull, checks and creation (default: 30m)")
	fs.DurationVar(&o.CommitTimeout, "commit-timeout", 0,
		"how long to wait for the change of the pod before everything is undone (default: 10m)")
	config.RenamedFlag(fs, "hold-timeout", "commit-timeout")
	fs.StringVar(&o.UID, "uid", "", "UID of the operation; the same UID continues the operation (default: a new one)")
	fs.BoolVar(&o.PrepareOnly, "prepare-only", false, "only pull, check and create; "+
		"the same command with --uid continues")
	fs.BoolVarP(&o.Watch, "watch", "w", false, "follow the operation until kubelet has adopted the new containers")
	// These fail for an unknown flag only.
	_ = cmd.MarkFlagFilename("auth-file", "json")
	_ = cmd.RegisterFlagCompletionFunc("container", cobra.NoFileCompletions)
	_ = cmd.RegisterFlagCompletionFunc("order", completeOrder())
	return cmd
}

// again returns the words of the command line that continues after --prepare-only: the same flags,
// without the UID.
func again(cmd *cobra.Command, pod string, containers []string) []string {
	words := []string{"cri-proxy", "ctl", "set-image", pod}
	for _, c := range containers {
		words = append(words, "-c", c)
	}
	cmd.Flags().Visit(func(flag *pflag.Flag) {
		switch flag.Name {
		case "container", "uid", "prepare-only", "watch", "output":
		default:
			words = append(words, "--"+config.FlagName(flag)+"="+flag.Value.String())
		}
	})
	return words
}
