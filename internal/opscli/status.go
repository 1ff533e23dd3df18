// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// NodeInfo writes the state of the daemon, of its runtime and of kubelet's connection.
func (p *Printer) NodeInfo(i *opsv1.NodeInfoResponse) error {
	if p.Format.structured() {
		return p.message(i)
	}
	n := i.GetCounters()
	w := tabwriter.NewWriter(p.Out, 0, 4, 2, ' ', 0)
	for _, row := range [][2]string{
		{"Node:", i.GetNodeName()},
		{"Version:", i.GetVersion()},
		{"Uptime:", p.age(i.GetStartTime())},
		{"Listen:", i.GetListen()},
		{"Kubelet:", p.kubelet(i)},
		{"Runtime:", runtime(i.GetRuntime())},
		{"Calls:", fmt.Sprintf("%d, %d in flight, %d with errors", n.GetCalls(), n.GetInFlight(), n.GetCallErrors())},
		{"Interceptors:", fmt.Sprintf("%d calls, %d faults", n.GetIntercepted(), n.GetInterceptorFaults())},
		{"Operations:", fmt.Sprintf("%d slots active, %d succeeded, %d failed",
			len(i.GetActiveSlots()), n.GetOperationsSucceeded(), n.GetOperationsFailed())},
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
	if _, err := fmt.Fprintln(p.Out); err != nil {
		return err
	}
	t := newTable(p.Out, "POD UID", "CONTAINER", "OPERATION", "PHASE")
	for _, s := range i.GetActiveSlots() {
		t.row(s.GetPodUid(), s.GetContainer(), s.GetOperationUid(), phaseName(s.GetPhase()))
	}
	return t.flush()
}

// kubelet describes kubelet's connection.
func (p *Printer) kubelet(i *opsv1.NodeInfoResponse) string {
	text := "not seen yet: is its --container-runtime-endpoint unix://" + i.GetListen() + "?"
	if i.GetKubeletLastCall() != nil {
		text = fmt.Sprintf("last call %s ago", p.age(i.GetKubeletLastCall()))
		if i.GetKubeletUserAgent() != "" {
			text += " (" + i.GetKubeletUserAgent() + ")"
		}
		if names := i.GetUnknownMethods(); len(names) > 0 {
			text += ", calls what this version does not know: " + strings.Join(names, ", ")
		}
	}
	if i.GetBypass() != "" {
		text = "BYPASSED " + i.GetBypass() + "; " + text
	}
	return text
}

// runtime describes the runtime and the daemon's connection to it.
func runtime(r *opsv1.Runtime) string {
	text := fmt.Sprintf("%s at %s", r.GetState(), r.GetEndpoint())
	if r.GetName() != "" {
		text = fmt.Sprintf("%s %s, %s", r.GetName(), r.GetVersion(), text)
	}
	return text
}

// restartMethods names the method that the daemon uses, and says why it does not use a better one.
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

// identity describes the certificate of the ops API over TCP, and what is wrong with it.
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
