// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// deadliner is a listener whose Accept can be woken.
type deadliner interface{ SetDeadline(t time.Time) error }

// Acceptor takes the connections of one listener, and can pause.
type Acceptor struct {
	listener net.Listener

	mu     sync.Mutex // guards all following fields
	closed bool
	// paused is closed when the pause ends; nil if there is none. idle is closed once nothing more
	// is accepted in the pause.
	paused, idle chan struct{}
}

// NewAcceptor returns an acceptor of the listener, which it closes.
func NewAcceptor(l net.Listener) *Acceptor { return &Acceptor{listener: l} }

// longAgo wakes an Accept.
func longAgo() time.Time { return time.Unix(1, 0) }

// Pause takes no connections until Resume: those that come wait in the socket's queue. The channel
// that it returns is closed once no connection is taken any more.
func (a *Acceptor) Pause() (<-chan struct{}, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	d, ok := a.listener.(deadliner)
	if !ok {
		return nil, fmt.Errorf("listener %s cannot be paused", a.listener.Addr())
	}
	if a.paused == nil {
		a.paused, a.idle = make(chan struct{}), make(chan struct{})
		if a.closed {
			close(a.idle)
			return a.idle, nil
		}
		if err := d.SetDeadline(longAgo()); err != nil {
			close(a.idle)
			return nil, err
		}
	}
	return a.idle, nil
}

// Resume ends a pause.
func (a *Acceptor) Resume() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paused == nil {
		return
	}
	_ = a.listener.(deadliner).SetDeadline(time.Time{}) // Pause has seen that it is one
	close(a.paused)
	a.paused = nil
}

// Close ends accepting for good and closes the listener. After a pause no connection is taken, not
// even for a moment: what is in the queue may be another process's.
func (a *Acceptor) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.closed = true
	_ = a.listener.Close()
	if a.paused != nil {
		close(a.paused)
		a.paused = nil
	}
}

// state returns whether the listener is closed, and a channel to wait for if it is paused.
func (a *Acceptor) state() (closed bool, paused <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.paused != nil {
		select {
		case <-a.idle:
		default:
			close(a.idle)
		}
	}
	return a.closed, a.paused
}

// Bounds of the wait after an error that passes by itself, such as too many open files; gRPC's own.
const (
	minRetryInterval = 5 * time.Millisecond
	maxRetryInterval = time.Second
)

// Next returns the next connection. It returns [net.ErrClosed] after Close.
func (a *Acceptor) Next() (net.Conn, error) {
	wait := minRetryInterval
	for {
		closed, paused := a.state()
		if closed {
			return nil, net.ErrClosed
		}
		if paused != nil {
			<-paused
			continue
		}
		Unblock(a.listener)
		c, err := a.listener.Accept()
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Woken by Pause or Close.
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED),
			errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			time.Sleep(wait) //nolint:forbidigo // nothing tells when there are descriptors again
			wait = min(2*wait, maxRetryInterval)
		default:
			if closed, _ := a.state(); closed {
				return nil, net.ErrClosed
			}
			return nil, err
		}
	}
}

// Unblock sets O_NONBLOCK on a listening socket that other processes have too. Call it before every
// Accept, so that Accept waits where a deadline or Close can wake it. All these processes share the
// flag, and systemd clears it when it starts another process with the socket: an Accept that begins
// then ends with the next connection and with nothing else.
func Unblock(l net.Listener) {
	c, ok := l.(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetNonblock(int(fd), true) }) // else it is as it was
	}
}
