// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/uninstall"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

// defaultNamespace is where the manifests put the controller.
const defaultNamespace = "cri-proxy-system"

func uninstallCommand() *cobra.Command {
	s := settings{logLevel: "info", format: "text"}
	var namespace string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop the controller and remove its traces from objects and pods, before you delete its manifests",
		Long: `Run this command before you delete the controller's manifests. Without a controller,
its finalizers would keep objects and their namespaces from being deleted, pods whose
readiness gate it has closed would stay out of service, and Deployments that it has
paused would stay paused.

The command scales the Deployment ` + uninstall.DeploymentName + ` to 0, waits until its pods are gone,
and undoes all of that. Requests, jobs, rollouts and the images of pods stay. You may
run it again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return runUninstall(ctx, s, namespace, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.kubeconfig, "kubeconfig", "", kubeconfigHelp)
	f.StringVar(&namespace, "namespace", "",
		"namespace of the controller; if empty, the pod's, or "+defaultNamespace+" outside a pod")
	f.StringVar(&s.logLevel, "log-level", "info", logLevelHelp)
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "maximum time for the whole command")
	return cmd
}

func runUninstall(ctx context.Context, s settings, namespace string, stdout, stderr io.Writer) error {
	log, err := newLog(s, stderr)
	if err != nil {
		return err
	}
	config, err := restConfig(s.kubeconfig, "cri-controller-uninstall/"+version.Short())
	if err != nil {
		return err
	}
	if namespace == "" {
		namespace = defaultNamespace
		if own, err := controller.PodNamespace(); err == nil {
			namespace = own
		}
	}
	return uninstall.Run(ctx, config, namespace, controller.LeaseName, log, stdout)
}
