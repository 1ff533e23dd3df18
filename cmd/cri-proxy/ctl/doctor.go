// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
	"github.com/cri-proxy/cri-proxy/systemd/node/doctor"
)

func (c *ctl) doctor() *cobra.Command {
	o := doctor.Options{Now: c.now}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check the whole chain from kubelet to the runtime",
		Long: `Check the whole chain on this node: kubelet's configuration and connections, the
daemon, the runtime and the controller. For each problem the command says what to do.
It changes nothing, and works without a running daemon. The exit code is 1 if something
does not work.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := interruptible(cmd)
			defer stop()
			if cmd.Flags().Changed("admin-socket") || c.client.Socket != config.DefaultAdminSocket {
				o.AdminSocket = c.client.Socket
			}
			findings := doctor.Examine(ctx, o)
			if err := c.printFindings(cmd.OutOrStdout(), findings); err != nil {
				return err
			}
			if n := doctor.Failed(findings); n > 0 {
				return fmt.Errorf("%d of %d checks failed", n, len(findings))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.ConfigFile, "config", config.DefaultFile, "configuration file of the daemon")
	return cmd
}

func (c *ctl) printFindings(out io.Writer, findings []doctor.Finding) error {
	switch c.format {
	case opscli.JSON:
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(findings)
	case opscli.YAML:
		e := yaml.NewEncoder(out)
		e.SetIndent(2)
		return e.Encode(findings)
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	for _, f := range findings {
		if _, err := fmt.Fprintf(w, "%s\t%s\t%s\n", strings.ToUpper(string(f.Status)), f.Check, f.Detail); err != nil {
			return err
		}
		if f.Hint != "" && f.Status != doctor.OK {
			if _, err := fmt.Fprintf(w, "\t\t-> %s\n", f.Hint); err != nil {
				return err
			}
		}
	}
	return w.Flush()
}
