// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cri-proxy/cri-proxy/test/testbed"
)

const (
	// timeout is for pods, single restarts and the cluster's coming to rest; all take seconds.
	timeout = 2 * time.Minute
	// sampleEvery is how often the proxy is measured: a scrape costs it milliseconds.
	sampleEvery = 2 * time.Second
	// sayEvery is how often a line is printed.
	sayEvery = 10 * time.Second
)

// options are the command line.
type options struct {
	time                                    time.Duration
	restarts, pods, parallel                int
	startFirst, requests                    float64
	method, out, proxyBinary, controllerBin string
	seed                                    uint64
}

func (o *options) parse(args []string) error {
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.DurationVar(&o.time, "time", 0, "restart for so long (default 10m unless -restarts is given)")
	fs.IntVar(&o.restarts, "restarts", 0, "end after so many restarts")
	fs.IntVar(&o.pods, "pods", 50, "pods on the node")
	fs.IntVar(&o.parallel, "parallel", 4, "restarts at a time, each in another pod")
	fs.Float64Var(&o.startFirst, "start-first", 0.5,
		"share of StartFirst in pods whose containers share their port; half of the pods do")
	fs.Float64Var(&o.requests, "requests", 0.15, "share of restarts that go through a ContainerRecreateRequest")
	fs.StringVar(&o.method, "method", "",
		"best restart method that the proxy may use: gate, pidfd or plain (default: the proxy's default)")
	fs.StringVar(&o.out, "out", "", "write the results as JSON to this file")
	fs.StringVar(&o.proxyBinary, "cri-proxy", "", "cri-proxy binary (default: built from the checkout)")
	fs.StringVar(&o.controllerBin, "cri-controller", "", "cri-controller binary (default: built from the checkout)")
	fs.Uint64Var(&o.seed, "seed", 0, "of the random choices (default: another one each time)")
	if err := fs.Parse(args); err != nil {
		return err
	}
	switch {
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.time < 0 || o.restarts < 0:
		return errors.New("-time and -restarts must not be negative")
	case o.parallel < 1 || o.pods <= o.parallel:
		return errors.New("-pods must be more than -parallel, and -parallel at least 1")
	case o.startFirst < 0 || o.startFirst > 1 || o.requests < 0 || o.requests > 1:
		return errors.New("-start-first and -requests are shares between 0 and 1")
	}
	if o.time == 0 && o.restarts == 0 {
		o.time = 10 * time.Minute
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var o options
	err := o.parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = run(ctx, o, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		stop()
		os.Exit(1)
	}
}

// errFailed is returned when the run came to its end and a check failed; the report says which.
var errFailed = errors.New("a check failed")

func run(ctx context.Context, o options, out io.Writer) (err error) {
	options := testbed.Options{
		Mode: testbed.ModeCluster, Log: out, KeepLogs: func() bool { return err != nil },
		ProxyBinary: o.proxyBinary, ControllerBinary: o.controllerBin,
		ProxyExtra: "log: {level: info, format: text}\n",
	}
	if o.method != "" {
		options.ProxyExtra += fmt.Sprintf("restart: {method: %q}\n", o.method)
	}
	bed, err := testbed.Start(ctx, options)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err = errors.Join(err, bed.Close(closing))
	}()
	s, err := newSoak(ctx, o, bed, out)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.run(ctx); err != nil {
		return err
	}
	result := s.judge(ctx)
	result.print(out)
	if o.out != "" {
		if err := result.write(o.out); err != nil {
			return err
		}
	}
	if !result.passed() {
		return errFailed
	}
	return nil
}
