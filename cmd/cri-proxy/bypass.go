// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
)

func newBypass() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "bypass",
		Short: "Take the proxy out of kubelet's path, or put it back",
		Long: `Take the proxy out of kubelet's path, or put it back. kubelet dials kubelet.sock, a
symlink beside the CRI socket. It points to the proxy or, while bypassed, to the
runtime. No call fails, and no container is touched. While bypassed, the daemon refuses
operations on containers.

The unit's guard bypasses the proxy too when the daemon crashes too often.`,
	}
	cmd.PersistentFlags().StringVar(&file, "config", config.DefaultFile, "configuration file of the daemon")
	open := func(c *cobra.Command) (*bypass.Path, error) { return bypass.Open(file, c.OutOrStdout()) }
	cmd.AddCommand(newBypassOn(open), newBypassOff(open), &cobra.Command{
		Use: "status", Short: "Print whether the proxy is bypassed", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.Status(c.Context())
		},
	}, &cobra.Command{
		Use: "apply", Short: "Set the symlink to what was requested last (run by the socket unit)", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.Apply()
		},
	})
	return cmd
}

func newBypassOn(open func(*cobra.Command) (*bypass.Path, error)) *cobra.Command {
	o := bypass.Options{}
	cmd := &cobra.Command{
		Use:   "on",
		Short: "Lead kubelet past the proxy",
		Long: `Lead kubelet past the proxy, to the runtime. The command waits for running operations,
so that kubelet does not see what they have prepared. With --force it cancels them, and
waits at most --wait for those that cannot be cancelled.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.On(c.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Reason, "reason", "cri-proxy bypass on",
		"reason to show in cri-proxy ctl status and in refusals of operations")
	f.BoolVar(&o.Force, "force", false, "cancel running operations; also bypass if kubelet does not dial the symlink")
	f.DurationVar(&o.Wait, "wait", 30*time.Second, "maximum time to wait for operations")
	f.BoolVar(&o.Automatic, "automatic", false, "set by crash-guard: no person requested the bypass")
	_ = f.MarkHidden("automatic")
	return cmd
}

func newBypassOff(open func(*cobra.Command) (*bypass.Path, error)) *cobra.Command {
	var force bool
	var unit string
	cmd := &cobra.Command{
		Use:   "off",
		Short: "Lead kubelet through the proxy again",
		Long: `Lead kubelet through the proxy again, if the proxy serves. kubelet keeps its present
connection to the runtime, and dials the proxy when kubelet or the runtime restarts.
--restart-kubelet restarts kubelet now. Containers keep running.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.Off(c.Context(), force, unit)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "lead kubelet back even if the proxy does not serve")
	cmd.Flags().StringVar(&unit, "restart-kubelet", "",
		"restart this unit of kubelet, and wait until kubelet has called the proxy")
	cmd.Flags().Lookup("restart-kubelet").NoOptDefVal = "kubelet.service"
	return cmd
}
