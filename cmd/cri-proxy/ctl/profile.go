// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// profileNames are those that the daemon has.
var profileNames = []string{"cpu", "heap", "allocs", "goroutine", "threadcreate", "trace"}

func (c *ctl) profile() *cobra.Command {
	var seconds int
	var text bool
	cmd := &cobra.Command{
		Use:   "profile " + strings.Join(profileNames, "|"),
		Short: "Take a profile of the daemon, for go tool pprof",
		Long: `Take a profile of the daemon and write it to standard output:

    cri-proxy ctl profile heap > heap.pprof && go tool pprof heap.pprof
    cri-proxy ctl profile cpu --seconds 10 > cpu.pprof
    cri-proxy ctl profile goroutine --text       # what the daemon does right now

Only this command gives profiles: the metrics address does not serve them.`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: profileNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			timed := args[0] == "cpu" || args[0] == "trace"
			switch {
			case seconds < 0 || time.Duration(seconds)*time.Second > 10*time.Minute:
				return usage("--seconds %d: want up to 600", seconds)
			case seconds > 0 && !timed:
				return usage("--seconds is for cpu and trace only")
			case text && timed:
				return usage("--text is not for cpu and trace")
			}
			out := cmd.OutOrStdout()
			if f, ok := out.(*os.File); ok && !text && term.IsTerminal(int(f.Fd())) {
				return usage("a profile is not for the terminal: write it to a file, ctl profile %s > %s.pprof",
					args[0], args[0])
			}
			ctx, stop := interruptible(cmd)
			defer stop()
			return c.client.Profile(ctx, out, &opsv1.ProfileRequest{
				Name: args[0], Duration: durationpb.New(time.Duration(seconds) * time.Second), Text: text,
			})
		},
	}
	cmd.Flags().IntVar(&seconds, "seconds", 0, "how many seconds to record, for cpu (default 30) and trace (default 5)")
	cmd.Flags().BoolVar(&text, "text", false, "print a readable form; not for cpu and trace")
	return cmd
}
