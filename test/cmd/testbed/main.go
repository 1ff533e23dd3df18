// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command testbed brings up real nodes and clusters on this machine for a person to poke at, with
// the same code as the tests.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "testbed:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{Use: "testbed", Short: "Real nodes and clusters on this machine", SilenceUsage: true,
		SilenceErrors: true}
	root.AddCommand(up(), down(), list(), build())
	return root
}

func up() *cobra.Command {
	var o testbed.Options
	var mode string
	var controller bool
	cmd := &cobra.Command{Use: "up", Short: "Start a bed; ctrl-C removes it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Mode, err = testbed.ParseMode(mode); err != nil {
				return err
			}
			o.Log = os.Stderr
			o.KeepLogs = func() bool { return err != nil }
			bed, err := testbed.Start(cmd.Context(), o)
			if err != nil {
				return err
			}
			if controller {
				if err = bed.InstallCRDs(cmd.Context()); err == nil {
					err = bed.StartController(cmd.Context())
				}
			}
			if err == nil {
				print(bed)
				if o.Detach {
					fmt.Printf("# testbed down %s removes it\n", bed.ID)
					return nil
				}
				<-cmd.Context().Done()
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), 2*time.Minute)
			defer cancel()
			return errors.Join(err, bed.Close(ctx))
		}}
	f := cmd.Flags()
	f.StringVar(&mode, "mode", "cluster", "node (containerd, registry, proxy) or cluster")
	f.IntVar(&o.Nodes, "nodes", 1, "number of nodes")
	f.BoolVar(&o.Direct, "direct", false, "no proxy: kubelet dials containerd")
	f.BoolVar(&o.Detach, "keep", false, "leave it running")
	f.BoolVar(&o.Race, "race", false, "build the project's programs with the race detector")
	f.BoolVar(&controller, "controller", false, "also install the CRDs and start cri-controller")
	return cmd
}

func print(b *testbed.Bed) {
	fmt.Printf("export PATH=%s:$PATH\n", b.Bin)
	fmt.Printf("export CONTAINER_RUNTIME_ENDPOINT=unix://%s\n", b.CRISocket)
	fmt.Printf("export CONTAINERD_ADDRESS=%s CONTAINERD_NAMESPACE=k8s.io\n", b.RuntimeSocket)
	if b.Kubeconfig != "" {
		fmt.Printf("export KUBECONFIG=%s\n", b.Kubeconfig)
	}
	fmt.Printf("# images: %s; also nginx:latest\n",
		strings.Join([]string{b.Image("app:1"), b.Image("busybox:1.0")}, ", "))
	fmt.Printf("# logs: %s\n", filepath.Join(b.Logs, "*.log"))
}

func down() *cobra.Command {
	var all bool
	cmd := &cobra.Command{Use: "down [ID...]", Short: "Remove beds that were left running",
		RunE: func(cmd *cobra.Command, ids []string) error {
			if all == (len(ids) > 0) {
				return errors.New("give the IDs to remove, or --all")
			}
			if all {
				beds, err := testbed.List()
				if err != nil {
					return err
				}
				for _, b := range beds {
					if b.State != "running" {
						ids = append(ids, b.ID)
					}
				}
			}
			var errs []error
			for _, id := range ids {
				errs = append(errs, testbed.Destroy(cmd.Context(), id, os.Stderr))
			}
			return errors.Join(errs...)
		}}
	cmd.Flags().BoolVar(&all, "all", false, "all that nobody owns any more")
	return cmd
}

func list() *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List the beds of this machine", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			beds, err := testbed.List()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tMODE\tSTATE\tOWNER\tAGE\tCRI SOCKET\tDIR")
			for _, b := range beds {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", b.ID, b.Mode, b.State, b.OwnerPID,
					time.Since(b.Started).Round(time.Second), b.CRISocket, b.Dir)
			}
			return w.Flush()
		}}
}

func build() *cobra.Command {
	var mode string
	cmd := &cobra.Command{Use: "build", Short: "Build the pinned components into the cache", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := testbed.ParseMode(mode)
			if err != nil {
				return err
			}
			dir, err := testbed.Build(cmd.Context(), "", m, os.Stderr)
			if err == nil {
				fmt.Println(dir)
			}
			return err
		}}
	cmd.Flags().StringVar(&mode, "mode", "cluster", "components of a node or a cluster")
	return cmd
}
