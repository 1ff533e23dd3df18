// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypass

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/config"
)

// Command returns `cri-proxy bypass`.
func Command() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "bypass",
		Short: "Take the proxy out of kubelet's path, or put it back",
		Long: `Take the proxy out of kubelet's path, or put it back. kubelet dials kubelet.sock
beside the CRI socket, a symlink that leads to the proxy or, bypassed, to the
runtime. No call fails, and no container is touched. While it is bypassed the
daemon refuses operations on containers.

The guard of the unit does the same when the daemon ends too often.`,
	}
	cmd.PersistentFlags().StringVar(&file, "config", config.DefaultFile, "configuration of the daemon")
	open := func(c *cobra.Command) (*path, error) {
		cfg := config.Default()
		if err := cfg.Load(file, nil); err != nil {
			return nil, err
		}
		if err := errors.Join(cfg.Complete(), cfg.Validate()); err != nil {
			return nil, &config.InvalidError{Err: err}
		}
		l, err := linksOf(cfg)
		return &path{config: cfg, links: l, out: c.OutOrStdout()}, err
	}
	cmd.AddCommand(newOn(open), newOff(open), &cobra.Command{
		Use: "status", Short: "Say whether the proxy is bypassed", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.status(c.Context())
		},
	}, &cobra.Command{
		Use: "apply", Short: "Make the symlink what was asked for last; the socket unit does", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.apply()
		},
	})
	return cmd
}

func newOn(open func(*cobra.Command) (*path, error)) *cobra.Command {
	o := onOptions{}
	cmd := &cobra.Command{
		Use:   "on",
		Short: "Lead kubelet past the proxy",
		Long: `Lead kubelet past the proxy, to the runtime. Operations are waited for, so that
kubelet does not see what they have prepared; with --force they are cancelled,
and those that cannot be are not waited for any longer than --wait.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.on(c.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.reason, "reason", "cri-proxy bypass on", "why, for cri-proxy ctl status and for whoever is refused an operation")
	f.BoolVar(&o.force, "force", false, "cancel operations")
	f.DurationVar(&o.wait, "wait", 30*time.Second, "for operations to end")
	f.BoolVar(&o.automatic, "automatic", false, "nobody has asked for it")
	_ = f.MarkHidden("automatic")
	return cmd
}

func newOff(open func(*cobra.Command) (*path, error)) *cobra.Command {
	var force bool
	var kubelet string
	cmd := &cobra.Command{
		Use:   "off",
		Short: "Lead kubelet through the proxy again",
		Long: `Lead kubelet through the proxy again, if the proxy serves. kubelet keeps the
connection that it has, so it comes with its next start; with --restart-kubelet
that is now. Containers run on.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := open(c)
			if err != nil {
				return err
			}
			return p.off(c.Context(), force, kubelet)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if the proxy does not serve")
	cmd.Flags().StringVar(&kubelet, "restart-kubelet", "", "restart kubelet, this unit, and wait until it has called")
	cmd.Flags().Lookup("restart-kubelet").NoOptDefVal = "kubelet.service"
	return cmd
}
