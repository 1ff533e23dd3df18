// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// pullFlags are the flags of `ctl pull`.
type pullFlags struct {
	authFile string
	limit    byteRate
	pin      time.Duration
	always   bool
	handler  string
	attempts int32
	timeout  time.Duration
	deadline time.Duration
	uid      string
	noWait   bool
}

func (c *ctl) pull() *cobra.Command {
	var f pullFlags
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pull an image ahead of time",
		Long: `Pull an image onto this node before it is needed.

One image is pulled at a time. While bytes of a pull of kubelet's come, for two
minutes at most, it waits. What has been fetched when a pull is interrupted, by
whatever, is not fetched again for an hour.

Credentials of the auth file go to the daemon, which keeps them in memory only.

^C cancels the pull, a second one leaves without waiting for the end of it. The
exit code is 1 if the image is not there in the end. With -o json or yaml only the
end is printed.`,
		Example: `  cri-proxy ctl pull nginx:1.29 --limit 20MiB/s
  cri-proxy ctl pull registry.example/team/app@sha256:... --auth-file ~/.docker/config.json --pin 24h`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one image: cri-proxy ctl pull IMAGE")
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(args[0])
			if err != nil {
				return err
			}
			return c.runPull(cmd, req, !f.noWait)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.authFile, "auth-file", "", "docker config file with credentials of registries, such as ~/.docker/config.json")
	fs.Var(&f.limit, "limit", "bytes a second at most, such as 20MiB/s (default: the node's own limit, or none)")
	fs.DurationVar(&f.pin, "pin", 0, "keep the image from kubelet's image garbage collection for this long (default: not at all)")
	fs.BoolVar(&f.always, "always", false, "ask the registry even if the image is there")
	fs.StringVar(&f.handler, "runtime-handler", "", "pull for the snapshotter of this handler, as a RuntimeClass names it (default: the runtime's)")
	fs.Int32Var(&f.attempts, "attempts", 0, "how often to try (default: 4)")
	fs.DurationVar(&f.timeout, "timeout", 0, "longest time of each attempt (default: 10m)")
	fs.DurationVar(&f.deadline, "deadline", 0, "longest time of all, waiting included (default: none)")
	fs.StringVar(&f.uid, "uid", "", "UID of the pull; giving it again does not pull again (default: a new one)")
	fs.BoolVar(&f.noWait, "no-wait", false, "return once the daemon has accepted the pull")
	_ = cmd.MarkFlagFilename("auth-file", "json") // fails for an unknown flag only
	return cmd
}

// request turns the command line into a request.
func (f *pullFlags) request(image string) (*opsv1.PullRequest, error) {
	for name, d := range map[string]time.Duration{"pin": f.pin, "timeout": f.timeout, "deadline": f.deadline} {
		if d < 0 {
			return nil, usage("--%s %s is negative", name, d)
		}
	}
	if f.attempts < 0 {
		return nil, usage("--attempts %d is negative", f.attempts)
	}
	req := &opsv1.PullRequest{
		Uid: uidOr(f.uid), Image: image, BytesPerSecond: int64(f.limit), RuntimeHandler: f.handler, MaxAttempts: f.attempts,
		PinFor: optional(f.pin), AttemptTimeout: optional(f.timeout), Deadline: optional(f.deadline), Owner: requester(),
	}
	if f.always {
		req.Policy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
	}
	if f.authFile != "" {
		var err error
		if req.Credentials, err = readAuthFile(f.authFile); err != nil {
			return nil, usage("--auth-file: %w", err)
		}
	}
	return req, nil
}

func optional(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func (c *ctl) runPull(cmd *cobra.Command, req *opsv1.PullRequest, wait bool) error {
	ctx, leave := context.WithCancelCause(cmd.Context())
	defer leave(nil)
	client, closeConn, err := c.dialImages(ctx)
	if err != nil {
		return err
	}
	defer closeConn()
	// From here on ^C must not leave a pull behind that nobody has asked for.
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(interrupts)
	op, err := begin(ctx, client, req)
	if err != nil {
		return plain(err)
	}
	out := cmd.OutOrStdout()
	if !wait {
		return c.printPulls(out, op, []*opsv1.PullOperation{op})
	}
	cancelled := make(chan error, 1)
	over := make(chan struct{})
	go func() { // ends with over
		cancelled <- cancelOnInterrupt(ctx, interrupts, over, leave, func(call context.Context) error {
			_, err := client.CancelPull(call, &opsv1.CancelPullRequest{Uid: req.GetUid(), Reason: "cancelled by " + requester()})
			return err
		})
	}()
	op, err = c.followPull(ctx, out, client, req)
	close(over)
	if cerr := <-cancelled; err == nil {
		err = cerr
	}
	switch {
	case errors.Is(context.Cause(ctx), errLeft):
		return fmt.Errorf("left while the pull is %s; see cri-proxy ctl pulls %s", strings.ToLower(pullPhase(op)), req.GetUid())
	case err != nil:
		return plain(err)
	}
	if c.output.structured() {
		if err := c.print(out, op); err != nil {
			return err
		}
	}
	return pullOutcome(op)
}

func begin(ctx context.Context, client opsv1.ImagesClient, req *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return client.Pull(call, req)
}

// errLeft ends the command at the second signal.
var errLeft = errors.New("left")

// cancelOnInterrupt calls cancel at the first signal and leaves at the second.
func cancelOnInterrupt(ctx context.Context, interrupts <-chan os.Signal, over <-chan struct{}, leave context.CancelCauseFunc, cancel func(context.Context) error) error {
	select {
	case <-interrupts:
	case <-over:
		return nil
	}
	answered := make(chan error, 1)
	go func() { // ends with the call
		call, end := context.WithTimeout(ctx, callTimeout)
		defer end()
		answered <- cancel(call)
	}()
	select {
	case <-interrupts:
		leave(errLeft)
		return <-answered
	case err := <-answered:
		if err != nil {
			leave(err)
			return err
		}
	}
	select {
	case <-interrupts:
		leave(errLeft)
	case <-over:
	}
	return nil
}

// followPull shows the pull to its end and returns it. A daemon that has been restarted on the way gets the credentials again.
func (c *ctl) followPull(ctx context.Context, out io.Writer, client opsv1.ImagesClient, req *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	var view interface {
		update(*opsv1.PullOperation) error
	}
	switch {
	case c.output.structured():
		view = silent{}
	case isTerminal(out):
		view = &bars{c: c, out: out, size: func() (int, int) {
			width, height, err := term.GetSize(int(out.(*os.File).Fd()))
			if err != nil {
				return 80, 24
			}
			return width, height
		}}
	default:
		view = &pullLines{c: c, out: out}
	}
	asked := false
	return follow(ctx, func(ctx context.Context, o ...grpc.CallOption) (grpc.ServerStreamingClient[opsv1.PullOperation], error) {
		return client.WatchPull(ctx, &opsv1.WatchPullRequest{Uid: req.GetUid()}, o...)
	}, func(op *opsv1.PullOperation) error {
		needed := op.GetReason() == reasonCredentialsNeeded && op.GetFinishTime() == nil
		if needed && !asked && len(req.GetCredentials()) > 0 {
			if _, err := begin(ctx, client, req); err != nil {
				return err
			}
		}
		asked = needed
		return view.update(op)
	})
}

// reasonCredentialsNeeded is the reason of a pull whose credentials went with the daemon's last process.
const reasonCredentialsNeeded = "CredentialsNeeded"

// pullOutcome is the error of a finished pull, nil if the image is there.
func pullOutcome(op *opsv1.PullOperation) error {
	switch {
	case op.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		return nil
	case op.GetPhase() == opsv1.PullPhase_PULL_CANCELLED:
		return fmt.Errorf("the pull of %s was cancelled: %s", op.GetImage(), op.GetMessage())
	case op.GetMessage() == "":
		return fmt.Errorf("the pull of %s has failed: %s", op.GetImage(), op.GetReason())
	}
	return fmt.Errorf("%s: %s", op.GetReason(), op.GetMessage())
}
