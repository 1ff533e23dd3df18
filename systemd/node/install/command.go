// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// defaultTimeout is for kubelet to be back and the node ready; kubelet itself needs seconds.
const defaultTimeout = 2 * time.Minute

// Command returns `cri-proxy install`.
func Command() *cobra.Command {
	i := &installer{config: config.Default()}
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put cri-proxy between kubelet and the runtime of this node",
		Long: `Put cri-proxy between kubelet and the runtime of this node: configuration,
units, binary, and kubelet's endpoint; then kubelet is restarted, and must call
through cri-proxy and report the node ready. Containers run on. If anything goes
wrong, everything is put back.

It may be run again at any time: what is as it should be stays. Interrupted, it
goes on with the next run, and cri-proxy uninstall undoes what was done. A newer
binary takes over from the one that runs, as with cri-proxy upgrade.

Settings of the daemon given as flags go into ` + config.DefaultFile + `;
the rest of that file stays as it is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if i.config.RecordCalls != "" {
				return &config.InvalidError{Err: errors.New("--record-calls is for cri-proxy serve only")}
			}
			outlive()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			i.flags, i.out = cmd.Flags(), cmd.OutOrStdout()
			return i.run(ctx)
		},
	}
	f := cmd.Flags()
	i.config.Flags(f)
	_ = f.MarkHidden("record-calls")
	f.BoolVar(&i.dryRun, "dry-run", false, "say what would be done")
	f.BoolVar(&i.force, "force", false, "even if a check fails")
	f.StringVar((*string)(&i.prefix), "prefix", "", "directory for the binaries, where /usr is read-only (default: that of what is installed, or "+string(update.DefaultPrefix)+")")
	f.BoolVar(&i.noKubelet, "no-kubelet", false, "leave kubelet alone: it is told the endpoint by somebody else, or has not been set up yet")
	common(cmd, &i.unit, &i.kubeconfig, &i.timeout)
	return cmd
}

// Uninstall returns `cri-proxy uninstall`.
func Uninstall() *cobra.Command { return uninstallCommand(&uninstaller{}) }

func uninstallCommand(u *uninstaller) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take cri-proxy off this node",
		Long: `Take cri-proxy off this node: kubelet is led past it, gets its configuration of
before and is restarted; then units and binaries are removed, and the pins that keep images
from kubelet's image garbage collection. Containers run on, and images stay.
The configuration and the journal stay, unless with --purge.

It may be run again at any time, and after an install that did not get to its end.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			outlive()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			u.out = cmd.OutOrStdout()
			return u.run(ctx)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&u.dryRun, "dry-run", false, "say what would be done")
	f.BoolVar(&u.force, "force", false, "cancel operations on containers that are under way")
	f.StringVar((*string)(&u.prefix), "prefix", "", "directory that the binaries are below (default: that of what is installed; another is refused)")
	f.BoolVar(&u.purge, "purge", false, "remove the configuration and the journal, too")
	f.BoolVar(&u.noKubelet, "no-kubelet", false, "leave kubelet alone: it must not dial cri-proxy any more")
	common(cmd, &u.unit, &u.kubeconfig, &u.timeout)
	return cmd
}

// LeftOver takes out of arguments of `cri-proxy uninstall` the flags, with their values, that only `cri-proxy install` has: they are left
// over from the installation, and an uninstall needs none of them. What neither knows stays, to be refused.
func LeftOver(args []string) (kept, leftOver []string) {
	ours, theirs := Uninstall().Flags(), Command().Flags()
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

// outlive has the process, and the programs that it runs, go on when whoever reads its output goes away: what is under way ends, or is put
// back. Go ends a process that writes to a broken pipe as its output unless it ignores SIGPIPE itself; SIGHUP comes when a session is lost.
func outlive() { signal.Ignore(unix.SIGPIPE, unix.SIGHUP) }

func common(cmd *cobra.Command, unit, kubeconfig *string, timeout *time.Duration) {
	f := cmd.Flags()
	f.StringVar(unit, "kubelet-unit", kubelet.DefaultUnit, "kubelet's systemd unit")
	f.StringVar(kubeconfig, "kubeconfig", "", "to ask whether the node is ready (default: kubelet's)")
	f.DurationVar(timeout, "timeout", defaultTimeout, "for kubelet to work again")
}
