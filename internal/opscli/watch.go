// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// restartWait is how long a watch waits for a daemon that went away, such as for its own restart.
const restartWait = 30 * time.Second

// Watch shows the course of an operation until it ends, and returns an error if it has not
// succeeded.
func (c Client) Watch(ctx context.Context, p *Printer, uid string) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return watchTo(ctx, p.view(), opsv1.NewOpsClient(conn), uid)
}

// view returns the form in which p shows the course of an operation.
func (p *Printer) view() watchView {
	switch {
	case p.Format.structured():
		return &documents{p}
	case isTerminal(p.Out):
		return &screen{p: p}
	}
	return &lines{p: p, last: map[string]string{}}
}

// watchTo is Watch with a view that may have shown something already.
func watchTo(ctx context.Context, view watchView, client opsv1.OpsClient, uid string) error {
	op, err := follow(ctx, func(ctx context.Context, o ...grpc.CallOption) (operationStream, error) {
		return client.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid}, o...)
	}, view.update)
	// gRPC may see the end of ctx a moment before ctx itself says so.
	code := status.Code(err)
	switch {
	case err != nil && op != nil && (ctx.Err() != nil || code == codes.DeadlineExceeded || code == codes.Canceled):
		why := "interrupted"
		if code == codes.DeadlineExceeded || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			why = "gave up waiting"
		}
		return fmt.Errorf("%s while the operation is %s; it goes on, see cri-proxy ctl ops %s",
			why, strings.ToLower(phaseName(op.GetPhase())), uid)
	case err != nil:
		return plain(err)
	}
	return outcome(op)
}

// operationStream is the answer of a watch.
type operationStream = grpc.ServerStreamingClient[opsv1.Operation]

// openFunc begins a watch.
type openFunc[M any] func(context.Context, ...grpc.CallOption) (grpc.ServerStreamingClient[M], error)

// finishing is an operation or a pull. The zero value stands for one that no answer has shown yet.
type finishing interface {
	comparable
	GetFinishTime() *timestamppb.Timestamp
}

// follow calls update for every state of an operation and returns the last state. When the daemon
// goes away, follow waits until it is back.
func follow[T finishing, M any](ctx context.Context, watch openFunc[M], update func(T) error) (T, error) {
	var last, none T
	for again := false; ; again = true {
		lost := followOnce(ctx, watch, again, &last, update)
		switch {
		case lost == nil, ctx.Err() != nil:
			return last, lost
		case status.Code(lost) != codes.Unavailable || last == none:
			return last, lost
		}
	}
}

// followOnce is one watch. again is set after a lost one: then it waits until the daemon is back.
func followOnce[T finishing, M any](
	ctx context.Context, watch openFunc[M], again bool, last *T, update func(T) error,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if again {
		t := time.AfterFunc(restartWait, func() {
			cancel(fmt.Errorf("the daemon went away during the operation and is not back after %s; "+
				"it takes the operation up when it is", restartWait))
		})
		defer t.Stop()
	}
	stream, err := watch(ctx, grpc.WaitForReady(again))
	if err != nil {
		return causeOf(ctx, err)
	}
	for {
		op, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if (*last).GetFinishTime() == nil {
				return status.Error(codes.Unavailable, "the watch ended before the operation")
			}
			return nil
		}
		if err != nil {
			return causeOf(ctx, err)
		}
		*last = any(op).(T)
		if err := update(*last); err != nil {
			return err
		}
	}
}

// causeOf returns the cause with which ctx was cancelled, and err if there is none.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, ctx.Err()) {
		return cause
	}
	return err
}

// watchView shows the course of an operation.
type watchView interface{ update(*opsv1.Operation) error }

// documents prints every state as JSON or YAML.
type documents struct{ p *Printer }

func (d *documents) update(op *opsv1.Operation) error { return d.p.message(op) }

// lines prints a line for every change of a container, and for every tenth of a pull: for pipes
// and logs.
type lines struct {
	p    *Printer
	last map[string]string
}

func (l *lines) update(op *opsv1.Operation) error {
	for _, r := range op.GetContainers() {
		text := phaseName(r.GetPhase())
		if note := containerNote(r); note != "" {
			text += ": " + note
		}
		key := text
		if p := r.GetPull(); pulling(r) && p.GetPhase() == opsv1.PullPhase_PULL_FETCHING {
			key = fmt.Sprint(phaseName(r.GetPhase()), pullState(p), tenthsOf(p), r.GetWarnings())
		}
		if l.last[r.GetName()] == key {
			continue
		}
		l.last[r.GetName()] = key
		if err := l.p.words("%s %s %s %s", l.p.clock(), podName(op.GetPod()), r.GetName(), text); err != nil {
			return err
		}
	}
	return nil
}

// clock returns the time of day.
func (p *Printer) clock() string { return p.Now().Format("15:04:05.000") }

// screen draws the table of containers over itself, with a bar for each pull below.
type screen struct {
	p     *Printer
	drawn int // lines
}

func (s *screen) update(op *opsv1.Operation) error {
	var b bytes.Buffer
	// A line that is too wide is cut, not wrapped, or more would have to be erased.
	b.WriteString("\x1b[?7l")
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\x1b[J", s.drawn)
	}
	before := b.Len()
	if err := s.p.to(&b).Operation(op); err != nil {
		return err
	}
	for _, r := range op.GetContainers() {
		if p := r.GetPull(); pulling(r) && p.GetBytesTotal() > 0 {
			fmt.Fprintf(&b, "  %s %s\n", bar(p.GetBytesDone(), p.GetBytesTotal(), maxBar), r.GetImage())
		}
	}
	s.drawn = bytes.Count(b.Bytes()[before:], []byte("\n"))
	b.WriteString("\x1b[?7h")
	_, err := s.p.Out.Write(b.Bytes())
	return err
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
