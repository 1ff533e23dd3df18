// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const usage = `usage: bench COMMAND [flags]

commands:
  passthrough   calls through the proxy against direct ones and a byte relay
  gap           how long a container does not answer when it is restarted, against other ways; needs root
  pull          images pre-pulled against the runtime's own pulls; needs root
  fanout        a job over thousands of simulated nodes, against an object per node; needs root
`

func run(ctx context.Context, args []string) error {
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	switch command {
	case "passthrough":
		fs := flag.NewFlagSet(command, flag.ExitOnError)
		var o options
		fs.StringVar(&o.out, "out", "", "write the results as JSON to this file")
		fs.StringVar(&o.criProxy, "cri-proxy", "",
			"cri-proxy binary whose idle memory is measured (default: this command's own proxy)")
		fs.StringVar(&o.only, "case", "", "run only the cases whose name contains this")
		fs.IntVar(&o.rounds, "rounds", 20, "batches per case and variant")
		fs.Float64Var(&o.scale, "scale", 1, "factor on the calls per batch")
		if err := fs.Parse(args); err != nil {
			return err
		}
		if o.rounds < 1 || o.scale <= 0 {
			return fmt.Errorf("-rounds and -scale must be positive")
		}
		return passthrough(ctx, o)
	case "gap":
		fs := flag.NewFlagSet(command, flag.ExitOnError)
		var o gapOptions
		var from string
		fs.StringVar(&o.out, "out", "", "write the results as JSON to this file")
		fs.StringVar(&o.plot, "plot", "", "draw the results as SVG into this file")
		fs.StringVar(&o.criProxy, "cri-proxy", "", "cri-proxy binary to measure (default: built from this checkout)")
		fs.StringVar(&o.only, "ways", "", "measure only these, with commas: "+wayNames)
		fs.IntVar(&o.rounds, "rounds", 20, "restarts per way")
		fs.IntVar(&o.series, "series", 20, "series of five restarts in a row")
		fs.DurationVar(&o.period, "period", 500*time.Microsecond, "rhythm of the client that measures gaps")
		fs.IntVar(&o.rate, "rate", 200,
			"requests a second, each on a new connection, of the client that counts failures")
		fs.StringVar(&from, "from", "", "measure nothing: print and draw the results in this JSON file")
		if err := fs.Parse(args); err != nil {
			return err
		}
		if from != "" {
			return redraw(from, o.plot)
		}
		if o.rounds < 1 || o.series < 0 || o.period <= 0 || o.rate < 1 {
			return fmt.Errorf("-rounds, -period and -rate must be positive, -series not negative")
		}
		return gap(ctx, o)
	case "pull":
		fs := flag.NewFlagSet(command, flag.ExitOnError)
		var o pullOptions
		fs.StringVar(&o.out, "out", "", "write the results as JSON to this file")
		fs.StringVar(&o.criProxy, "cri-proxy", "", "cri-proxy binary to measure (default: built from this checkout)")
		fs.IntVar(&o.rounds, "rounds", 11, "pulls each way")
		fs.IntVar(&o.layers, "layers", 8, "layers of the image")
		fs.IntVar(&o.mib, "mib", 128, "MiB of each layer")
		if err := fs.Parse(args); err != nil {
			return err
		}
		if o.rounds < 1 || o.layers < 1 || o.mib < 1 {
			return fmt.Errorf("-rounds, -layers and -mib must be positive")
		}
		return pullBenchmark(ctx, o)
	case "fanout":
		fs := flag.NewFlagSet(command, flag.ExitOnError)
		var o fanoutOptions
		var sizes string
		fs.StringVar(&o.out, "out", "", "write the results as JSON to this file")
		fs.StringVar(&o.controller, "cri-controller", "",
			"cri-controller binary to measure (default: built from this checkout)")
		fs.StringVar(&sizes, "nodes", "100,1000,5000", "numbers of nodes, with commas, at most 50000")
		fs.DurationVar(&o.idle, "idle", time.Minute, "how long the idle controller is looked at")
		if err := fs.Parse(args); err != nil {
			return err
		}
		for s := range strings.SplitSeq(sizes, ",") {
			n, err := strconv.Atoi(s)
			if err != nil || n < 1 || n > 50000 {
				return fmt.Errorf("-nodes %q: want numbers from 1 to 50000, with commas", sizes)
			}
			o.sizes = append(o.sizes, n)
		}
		if o.idle <= 0 {
			return fmt.Errorf("-idle must be positive")
		}
		return fanout(ctx, o)
	case "role": // one of the processes, started by other commands
		return runRole(ctx, args)
	}
	fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("unknown command %q", command)
}
