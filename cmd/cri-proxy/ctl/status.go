// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

func (c *ctl) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the daemon, its runtime and what it has seen of kubelet",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info, err := c.info(cmd)
			if err != nil {
				return err
			}
			if c.output.structured() {
				return c.print(cmd.OutOrStdout(), info)
			}
			return c.printStatus(cmd.OutOrStdout(), info)
		},
	}
}

func (c *ctl) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this binary and of the daemon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			if _, err := fmt.Fprintf(out, "Client: %s\n", version.Short()); err != nil {
				return err
			}
			info, err := c.info(cmd)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "Daemon: %s\n", info.GetVersion())
			return err
		},
	}
}

func (c *ctl) info(cmd *cobra.Command) (*opsv1.NodeInfoResponse, error) {
	ctx, stop := interruptible(cmd)
	defer stop()
	client, closeConn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer closeConn()
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	info, err := client.NodeInfo(call, &opsv1.NodeInfoRequest{})
	return info, plain(err)
}

// restartMethods names the method that is used and says why a better one is not.
func restartMethods(methods []*opsv1.RestartMethod) string {
	var not []string
	for _, m := range methods {
		if m.GetAvailable() {
			if len(not) == 0 {
				return m.GetName()
			}
			return fmt.Sprintf("%s (%s)", m.GetName(), strings.Join(not, "; "))
		}
		not = append(not, fmt.Sprintf("no %s: %s", m.GetName(), m.GetReason()))
	}
	return strings.Join(not, "; ")
}

// identity says with which certificate commands come over TCP, and what is wrong with it.
func identity(i *opsv1.Identity) string {
	if i == nil {
		return "none, commands come over this socket only (ops.address is not set)"
	}
	at := func(t *timestamppb.Timestamp) string { return t.AsTime().Local().Format(time.RFC3339) }
	text := "no certificate yet"
	switch {
	case i.GetExpireTime() != nil && i.GetExpireTime().AsTime().Before(time.Now()):
		text = "certificate EXPIRED " + at(i.GetExpireTime())
	case i.GetExpireTime() != nil:
		text = "certificate until " + at(i.GetExpireTime())
	}
	text += map[string]string{"controller": ", from the controller", "files": ", from files"}[i.GetSource()]
	if i.GetRenewTime() != nil {
		text += ", renewed from " + at(i.GetRenewTime())
	}
	if i.GetProblem() != "" {
		text += "; PROBLEM since " + at(i.GetSince()) + ": " + i.GetProblem()
		if i.GetRetryTime() != nil {
			text += " (tried again at " + at(i.GetRetryTime()) + ")"
		}
	}
	return text
}

func (c *ctl) printStatus(out io.Writer, i *opsv1.NodeInfoResponse) error {
	kubelet := "not seen yet: is its --container-runtime-endpoint unix://" + i.GetListen() + "?"
	if i.GetKubeletLastCall() != nil {
		kubelet = fmt.Sprintf("last call %s ago", c.age(i.GetKubeletLastCall()))
		if i.GetKubeletUserAgent() != "" {
			kubelet += " (" + i.GetKubeletUserAgent() + ")"
		}
		if names := i.GetUnknownMethods(); len(names) > 0 {
			kubelet += ", calls what this version does not know: " + strings.Join(names, ", ")
		}
	}
	runtime := fmt.Sprintf("%s at %s", i.GetRuntime().GetState(), i.GetRuntime().GetEndpoint())
	if i.GetRuntime().GetName() != "" {
		runtime = fmt.Sprintf("%s %s, %s", i.GetRuntime().GetName(), i.GetRuntime().GetVersion(), runtime)
	}
	if i.GetBypass() != "" {
		kubelet = "BYPASSED " + i.GetBypass() + "; " + kubelet
	}
	n := i.GetCounters()
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	for _, row := range [][2]string{
		{"Node:", i.GetNodeName()},
		{"Version:", i.GetVersion()},
		{"Uptime:", c.age(i.GetStartTime())},
		{"Listen:", i.GetListen()},
		{"Kubelet:", kubelet},
		{"Runtime:", runtime},
		{"Calls:", fmt.Sprintf("%d, %d in flight, %d with errors", n.GetCalls(), n.GetInFlight(), n.GetCallErrors())},
		{"Interceptors:", fmt.Sprintf("%d calls, %d faults", n.GetIntercepted(), n.GetInterceptorFaults())},
		{"Operations:", fmt.Sprintf("%d slots active, %d succeeded, %d failed", len(i.GetActiveSlots()), n.GetOperationsSucceeded(), n.GetOperationsFailed())},
		{"Restarts:", restartMethods(i.GetRestartMethods())},
		{"Identity:", identity(i.GetIdentity())},
		{"Recorded:", fmt.Sprintf("%d containers", n.GetRecordedContainers())},
	} {
		if _, err := fmt.Fprintf(w, "%s\t%s\n", row[0], row[1]); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil || len(i.GetActiveSlots()) == 0 {
		return err
	}
	if _, err := fmt.Fprintln(out); err != nil {
		return err
	}
	t := newTable(out, "POD UID", "CONTAINER", "OPERATION", "PHASE")
	for _, s := range i.GetActiveSlots() {
		t.row(s.GetPodUid(), s.GetContainer(), s.GetOperationUid(), phaseName(s.GetPhase()))
	}
	return t.flush()
}
