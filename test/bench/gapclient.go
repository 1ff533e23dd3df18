// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Limits of the clients. Peers are on this machine: what does not connect within dialLimit is not
// there.
const (
	dialLimit    = 20 * time.Millisecond
	requestLimit = time.Second
)

// watcher is an HTTP client that asks the app who it is, in a fixed rhythm over one connection.
// When that breaks it dials anew at once, and then in its rhythm.
type watcher struct {
	period time.Duration
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	address string        // guarded by mu
	seen    []seenProcess // guarded by mu, in order of the first answer
	news    chan struct{} // guarded by mu; closed and replaced when seen grows
}

// seenProcess is a process that has answered, known by the time at which it says it has started.
type seenProcess struct {
	start       string
	first, last time.Time
}

func startWatcher(ctx context.Context, address string, period time.Duration) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	w := &watcher{period: period, cancel: cancel, done: make(chan struct{}), address: address,
		news: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.run(ctx)
	}()
	return w
}

// stop ends the client and may be called again.
func (w *watcher) stop() {
	w.cancel()
	<-w.done
}

// follow makes the client go to another address.
func (w *watcher) follow(address string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.address = address
}

func (w *watcher) target() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.address
}

func (w *watcher) run(ctx context.Context) {
	tick := time.NewTicker(w.period)
	defer tick.Stop()
	var c *appConn
	defer func() { c.close() }()
	for ctx.Err() == nil {
		if c == nil || c.address != w.target() {
			c.close()
			c = dialApp(ctx, w.target())
		}
		if c != nil {
			start, err := c.ask()
			if err != nil {
				used := c.used
				c.close()
				c = nil
				if used {
					continue // at once
				}
			} else {
				w.answered(start, time.Now())
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (w *watcher) answered(start string, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := slices.IndexFunc(w.seen, func(p seenProcess) bool { return p.start == start }); i >= 0 {
		w.seen[i].last = at
		return
	}
	w.seen = append(w.seen, seenProcess{start, at, at})
	close(w.news)
	w.news = make(chan struct{})
}

// other waits until a process has answered after the given one, any when that is empty, and returns
// its start.
func (w *watcher) other(ctx context.Context, than string) (string, error) {
	for {
		w.mu.Lock()
		next := 0
		if than != "" {
			next = 1 + slices.IndexFunc(w.seen, func(p seenProcess) bool { return p.start == than })
		}
		start, news := "", w.news
		if next < len(w.seen) {
			start = w.seen[next].start
		}
		w.mu.Unlock()
		if start != "" {
			return start, nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return "", fmt.Errorf("no new process answers at %s: %w", w.target(), context.Cause(ctx))
		}
	}
}

// gap is from the last answer of one process to the first of another.
func (w *watcher) gap(old, fresh string) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	var from, to time.Time
	for _, p := range w.seen {
		switch p.start {
		case old:
			from = p.last
		case fresh:
			to = p.first
		}
	}
	return to.Sub(from)
}

// appConn is a connection to the app. A nil one can be closed.
type appConn struct {
	net.Conn
	address string
	in      *bufio.Reader
	used    bool // it has answered before
}

// dialApp returns nil when nobody listens.
func dialApp(ctx context.Context, address string) *appConn {
	d := net.Dialer{Timeout: dialLimit}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil
	}
	return &appConn{Conn: c, address: address, in: bufio.NewReader(c)}
}

func (c *appConn) close() {
	if c != nil {
		c.Conn.Close()
	}
}

// ask returns when the app's process says it has started.
func (c *appConn) ask() (string, error) {
	if err := c.SetDeadline(time.Now().Add(requestLimit)); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: app\r\n\r\n")); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var id struct {
		StartTime string `json:"startTime"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&id); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK || id.StartTime == "" {
		return "", fmt.Errorf("status %s, start time %q", resp.Status, id.StartTime)
	}
	c.used = true
	return id.StartTime, nil
}

// requests is an HTTP client that sends requests at a fixed rate, each on a connection of its own,
// whether or not earlier ones have been answered. None is repeated.
type requests struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu           sync.Mutex
	address      string // guarded by mu
	sent, failed int    // guarded by mu
	failure      string // the first one, guarded by mu
}

func startRequests(ctx context.Context, address string, perSecond int) *requests {
	ctx, cancel := context.WithCancel(ctx)
	r := &requests{cancel: cancel, done: make(chan struct{}), address: address}
	go func() {
		defer close(r.done)
		var wg sync.WaitGroup
		defer wg.Wait() // what was sent counts
		client := &http.Client{Timeout: requestLimit, Transport: &http.Transport{DisableKeepAlives: true}}
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				r.mu.Lock()
				url := "http://" + r.address + "/"
				r.mu.Unlock()
				wg.Go(func() { r.count(send(context.WithoutCancel(ctx), client, url)) })
			case <-ctx.Done():
				return
			}
		}
	}()
	return r
}

// stop ends the client when all it has sent is answered or failed, and may be called again.
func (r *requests) stop() {
	r.cancel()
	<-r.done
}

// follow makes the client go to another address.
func (r *requests) follow(address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.address = address
}

func (r *requests) count(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent++
	if err != nil {
		r.failed++
		if r.failure == "" {
			r.failure = err.Error()
		}
	}
}

func (r *requests) result() (sent, failed int, failure string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent, r.failed, r.failure
}

// send makes one request and reads the whole answer.
func send(ctx context.Context, c *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var id map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&id); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	return nil
}
