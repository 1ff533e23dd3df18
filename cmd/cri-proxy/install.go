// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/install"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// kubeletTimeout is for kubelet to be back and the node ready. kubelet itself needs seconds.
const kubeletTimeout = 2 * time.Minute

func newInstall() *cobra.Command {
	o := install.Options{Config: config.Default()}
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put cri-proxy between kubelet and the runtime of this node",
		Long: `Put cri-proxy between kubelet and the runtime of this node. The command writes the
configuration, the units and the binary, sets kubelet's endpoint and restarts kubelet.
Then it waits until kubelet has called through cri-proxy and has reported the node
ready. Containers keep running. If anything fails, the command restores everything.

You may run it again at any time: it changes only what is missing or different. After
an interruption, the next run goes on, and cri-proxy uninstall undoes what was done. A
newer binary takes over from the running one, as with cri-proxy self-update.

Flags that are settings of the daemon go into ` + config.DefaultFile + `. The rest of
that file stays as it is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Config.RecordCalls != "" {
				return &config.InvalidError{Err: errors.New("--record-calls is for cri-proxy serve only")}
			}
			outlive()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			o.Given, o.Out = config.GivenIn(cmd.Flags()), cmd.OutOrStdout()
			return install.Run(ctx, o)
		},
	}
	f := cmd.Flags()
	o.Config.Flags(f)
	_ = f.MarkHidden("record-calls")
	f.BoolVar(&o.DryRun, "dry-run", false, dryRunUsage)
	f.BoolVar(&o.Force, "force", false, "install even if a check fails")
	f.StringVar((*string)(&o.Prefix), "prefix", "", "directory below which the binaries go, "+
		"for nodes with a read-only /usr "+
		"(default: the installed prefix, or "+string(update.DefaultPrefix)+")")
	f.BoolVar(&o.NoKubelet, "no-kubelet", false,
		"do not touch kubelet: its endpoint is set elsewhere, or kubelet is not set up yet")
	kubeletFlags(f, &o.Unit, &o.Kubeconfig, &o.Timeout)
	return cmd
}

func newUninstall() *cobra.Command {
	o := install.UninstallOptions{}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove cri-proxy from this node",
		Long: `Remove cri-proxy from this node. The command leads kubelet past cri-proxy, restores
kubelet's former configuration and restarts kubelet. Then it removes the units, the
binaries, and the pins that keep images from kubelet's image garbage collection.
Containers keep running, and images stay. The configuration and the journal stay too,
unless you give --purge.

You may run it again at any time, also after an install that did not finish.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			outlive()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			o.Out = cmd.OutOrStdout()
			return install.Uninstall(ctx, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.DryRun, "dry-run", false, dryRunUsage)
	f.BoolVar(&o.Force, "force", false, "cancel running operations")
	f.StringVar((*string)(&o.Prefix), "prefix", "",
		"directory below which the binaries are (default: the installed prefix; any other is refused)")
	f.BoolVar(&o.Purge, "purge", false, "also remove the configuration and the journal")
	f.BoolVar(&o.NoKubelet, "no-kubelet", false, "do not touch kubelet; it must no longer dial cri-proxy")
	kubeletFlags(f, &o.Unit, &o.Kubeconfig, &o.Timeout)
	return cmd
}

const dryRunUsage = "print what would be done, and change nothing"

func kubeletFlags(f *pflag.FlagSet, unit, kubeconfig *string, timeout *time.Duration) {
	f.StringVar(unit, "kubelet-unit", kubelet.DefaultUnit, "systemd unit of kubelet")
	f.StringVar(kubeconfig, "kubeconfig", "", "kubeconfig to ask whether the node is ready (default: kubelet's)")
	f.DurationVar(timeout, "timeout", kubeletTimeout, "maximum time until kubelet works again")
}

// leftOver takes flags, with their values, out of arguments of `cri-proxy uninstall` that only
// `cri-proxy install` has: they are left over from the installation, and an uninstall needs none of
// them. An argument that neither command has stays, to be refused.
func leftOver(args []string) (kept, leftOver []string) {
	ours, theirs := newUninstall().Flags(), newInstall().Flags()
	for n := 0; n < len(args); n++ {
		name, _, whole := strings.Cut(strings.TrimPrefix(args[n], "--"), "=")
		known := func(f *pflag.FlagSet) *pflag.Flag {
			if !strings.HasPrefix(args[n], "--") {
				return nil
			}
			return f.Lookup(name)
		}
		to, flag := &kept, known(ours)
		if flag == nil {
			if flag = known(theirs); flag != nil {
				to = &leftOver
			}
		}
		*to = append(*to, args[n])
		if flag != nil && !whole && flag.NoOptDefVal == "" && n+1 < len(args) {
			n++
			*to = append(*to, args[n])
		}
	}
	return kept, leftOver
}

// outlive lets this process, and the programs that it runs, go on when the reader of the output
// goes away, until the work ends or everything is restored. A write to a broken pipe ends a Go
// process unless it ignores SIGPIPE. SIGHUP comes when a session is lost.
func outlive() { signal.Ignore(unix.SIGPIPE, unix.SIGHUP) }
