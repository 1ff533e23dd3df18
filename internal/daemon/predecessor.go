// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/connectivity"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

// predecessor is the process that had the state before this one, and still answers calls. Nil
// stands for no such process.
type predecessor struct {
	conn    *takeover.Conn
	pid     int
	granted *takeover.Granted
	log     logrus.FieldLogger
	owned   sync.WaitGroup
}

// askForState asks the process that has the state for it, and waits until the state is free. It
// returns nil if there is no such process.
//
// Errors: the process refuses, with its reason.
func (d *daemon) askForState(ctx context.Context) (*predecessor, error) {
	conn, err := takeover.Dial(ctx, d.config.StateDir)
	if conn == nil || err != nil {
		return nil, err
	}
	// The other process does not wait long for a request. So this process waits for the runtime
	// before it asks.
	conn.Close()
	d.awaitUpstream(ctx)
	if conn, err = takeover.Dial(ctx, d.config.StateDir); conn == nil || err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	pid, err := conn.PID()
	if err == nil && pid == os.Getpid() {
		err = errors.New("asking myself")
	}
	if err == nil {
		err = conn.Send(takeover.Message{Want: takeover.WantState, Version: version.Short()})
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("asking for the state: %w", err)
	}
	log := d.log.WithField("predecessor", pid)
	log.Info("another process serves, asking it for the state")
	for {
		m, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			conn.Close()
			return nil, ctx.Err()
		case errors.Is(err, io.EOF) || err != nil:
			conn.Close()
			log.WithError(err).Warn("the other process has gone away")
			return nil, nil
		case m.Refused != "":
			conn.Close()
			return nil, fmt.Errorf("process %d serves on: %s", pid, m.Refused)
		case m.Granted != nil:
			log.Info("the other process has given the state")
			return &predecessor{conn: conn, pid: pid, granted: m.Granted, log: log}, nil
		case m.Waiting != "":
			log.WithField("for", m.Waiting).Info("the takeover waits")
			d.notify.send(fmt.Sprintf("STATUS=Waiting for process %d to hand over: "+
				"%s\nEXTEND_TIMEOUT_USEC=%d", pid, m.Waiting, (time.Minute).Microseconds()))
		}
	}
}

// upstreamTimeout is how long a process waits for its connection to the runtime before it takes
// over from a process that has one.
const upstreamTimeout = time.Second

// awaitUpstream waits for the runtime, which may be away.
func (d *daemon) awaitUpstream(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	for state := d.upstream.State(); state != connectivity.Ready; state = d.upstream.State() {
		if !d.upstream.Conn().WaitForStateChange(ctx, state) {
			return
		}
	}
}

// view returns the view that the predecessor has transferred.
func (p *predecessor) view() view.State {
	if p == nil {
		return view.State{}
	}
	return p.granted.View
}

// follow applies the predecessor's reports to the state until the predecessor exits. It keeps the
// number of remaining calls in calls, and nil after the exit.
func (p *predecessor) follow(st *state, calls *atomic.Pointer[int]) {
	if p == nil {
		return
	}
	p.owned.Go(func() {
		pulled := func() {}
		pulling := false
		apply := func(l takeover.Remaining) {
			st.view.StopsElsewhere(l.Stops)
			calls.Store(&l.Calls)
			switch {
			case l.Pulls > 0 && !pulling:
				pulling, pulled = true, st.puller.KubeletPulls("") // it does not tell of which
			case l.Pulls == 0 && pulling:
				pulled()
				pulling = false
			}
		}
		apply(p.granted.Remaining)
		for {
			m, err := p.conn.Receive()
			if err != nil {
				apply(takeover.Remaining{})
				calls.Store(nil)
				p.log.Info("the process before this one has ended")
				return
			}
			if m.Remaining != nil {
				apply(*m.Remaining)
			}
		}
	})
}

// serving tells the predecessor that this process serves. From then on the predecessor cannot take
// the state back.
func (p *predecessor) serving() error {
	if p == nil {
		return nil
	}
	if err := p.conn.Send(takeover.Message{Serving: true}); err != nil {
		return fmt.Errorf("process %d has taken the state back: %w", p.pid, err)
	}
	return nil
}

func (p *predecessor) close() {
	if p == nil {
		return
	}
	p.conn.Close()
	p.owned.Wait()
}
