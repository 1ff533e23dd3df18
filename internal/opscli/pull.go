// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// PullOptions are the flags of `cri-proxy ctl pull`. Zero durations and numbers stand for the
// daemon's defaults.
type PullOptions struct {
	AuthFile       string
	Limit          ByteRate
	Pin            time.Duration
	Always         bool
	RuntimeHandler string
	Attempts       int32
	Timeout        time.Duration // of an attempt
	Deadline       time.Duration
	UID            string // empty: a new one
	NoWait         bool
}

// request turns the command line into a request.
func (o *PullOptions) request(image string) (*opsv1.PullRequest, error) {
	for name, d := range map[string]time.Duration{"pin": o.Pin, "timeout": o.Timeout, "deadline": o.Deadline} {
		if d < 0 {
			return nil, usage("--%s %s is negative", name, d)
		}
	}
	if o.Attempts < 0 {
		return nil, usage("--attempts %d is negative", o.Attempts)
	}
	req := &opsv1.PullRequest{
		Uid: uidOr(o.UID), Image: image, Owner: Requester(),
		BytesPerSecond: int64(o.Limit), RuntimeHandler: o.RuntimeHandler, MaxAttempts: o.Attempts,
		PinFor: optional(o.Pin), AttemptTimeout: optional(o.Timeout), Deadline: optional(o.Deadline),
	}
	if o.Always {
		req.Policy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
	}
	var err error
	req.Credentials, err = credentials(o.AuthFile)
	return req, err
}

func optional(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

// Run pulls an image and shows the pull. The first SIGINT or SIGTERM cancels the pull, the second
// one ends Run at once.
func (o *PullOptions) Run(ctx context.Context, c Client, p *Printer, image string) error {
	req, err := o.request(image)
	if err != nil {
		return err
	}
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := opsv1.NewImagesClient(conn)
	// From here on ^C must not leave a pull behind that nobody wants any more.
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(interrupts)
	op, err := begin(ctx, client, req)
	if err != nil {
		return plain(err)
	}
	if o.NoWait {
		return p.Pull(op)
	}
	cancelled := make(chan error, 1)
	over := make(chan struct{})
	go func() { // ends with over
		cancelled <- cancelOnInterrupt(ctx, interrupts, over, leave, func(call context.Context) error {
			_, err := client.CancelPull(call, &opsv1.CancelPullRequest{
				Uid: req.GetUid(), Reason: "cancelled by " + Requester(),
			})
			return err
		})
	}()
	op, err = p.followPull(ctx, client, req)
	close(over)
	if cerr := <-cancelled; err == nil {
		err = cerr
	}
	switch {
	case errors.Is(context.Cause(ctx), errLeft):
		return fmt.Errorf("left while the pull is %s; see cri-proxy "+
			"ctl pulls %s", strings.ToLower(pullPhase(op)), req.GetUid())
	case err != nil:
		return plain(err)
	}
	if p.Format.structured() {
		if err := p.message(op); err != nil {
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

// errLeft ends a command at the second signal.
var errLeft = errors.New("left")

// cancelOnInterrupt calls cancel at the first signal, and leave at the second. It returns when over
// is closed.
func cancelOnInterrupt(
	ctx context.Context, interrupts <-chan os.Signal, over <-chan struct{},
	leave context.CancelCauseFunc, cancel func(context.Context) error,
) error {
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

// pullView shows the course of a pull.
type pullView interface {
	update(*opsv1.PullOperation) error
}

func (p *Printer) pullView() pullView {
	switch {
	case p.Format.structured():
		return silent{}
	case isTerminal(p.Out):
		return &bars{out: p.Out, size: func() (int, int) {
			width, height, err := term.GetSize(int(p.Out.(*os.File).Fd()))
			if err != nil {
				return 80, 24
			}
			return width, height
		}}
	}
	return &pullLines{p: p}
}

// followPull shows the pull until it ends and returns it. If the daemon restarts meanwhile,
// followPull sends the credentials to it once more.
func (p *Printer) followPull(
	ctx context.Context, client opsv1.ImagesClient, req *opsv1.PullRequest,
) (*opsv1.PullOperation, error) {
	view := p.pullView()
	asked := false
	open := func(ctx context.Context, o ...grpc.CallOption) (grpc.ServerStreamingClient[opsv1.PullOperation], error) {
		return client.WatchPull(ctx, &opsv1.WatchPullRequest{Uid: req.GetUid()}, o...)
	}
	return follow(ctx, open, func(op *opsv1.PullOperation) error {
		// The credentials went with the daemon's last process.
		needed := op.GetReason() == opsv1.PullReasonCredentialsNeeded && op.GetFinishTime() == nil
		if needed && !asked && len(req.GetCredentials()) > 0 {
			if _, err := begin(ctx, client, req); err != nil {
				return err
			}
		}
		asked = needed
		return view.update(op)
	})
}

// pullOutcome is the error of a finished pull, nil if the node has the image.
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
