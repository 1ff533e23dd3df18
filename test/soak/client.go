// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

const (
	// calmInterval and busyInterval are between two requests to a container, outside of its
	// restarts and during them.
	calmInterval = 250 * time.Millisecond
	busyInterval = 10 * time.Millisecond
	// requestTimeout is above what a loaded machine of two CPUs needs.
	requestTimeout = 3 * time.Second
)

// client asks one container's server over and over, each time on a new connection, and follows
// which process answers. Processes tell when they began, on the clock of this machine.
type client struct {
	url  string
	http *http.Client
	busy chan struct{} // wakes the client for a restart

	mu         sync.Mutex // guards all following fields
	window     *window
	newest     time.Time // when the newest process that answered began
	processes  map[time.Time]bool
	lastAnswer time.Time
	changed    chan struct{} // closed and replaced when newest changes
	traffic    traffic
	violations []string
	overlapped []string // errors during StartFirst, the first ones
}

// traffic counts requests.
type traffic struct {
	Answered int `json:"answered"`
	// Unanswered is by what went on in the container: nothing, a restart StopFirst, a restart
	// StartFirst.
	UnansweredCalm       int `json:"unansweredCalm"`
	UnansweredStopFirst  int `json:"unansweredStopFirst"`
	UnansweredStartFirst int `json:"unansweredStartFirst"`
}

func (t *traffic) add(o traffic) {
	t.Answered += o.Answered
	t.UnansweredCalm += o.UnansweredCalm
	t.UnansweredStopFirst += o.UnansweredStopFirst
	t.UnansweredStartFirst += o.UnansweredStartFirst
}

// window is the time of a restart, from just before the command until the successor has answered.
type window struct {
	overlap bool // StartFirst: both processes answer for a while
	longest time.Duration
	asked   bool // in the window: before it, requests are further apart
	failed  int
}

func newClient(url string) *client {
	return &client{
		url: url, busy: make(chan struct{}, 1), processes: map[time.Time]bool{}, changed: make(chan struct{}),
		http: &http.Client{Timeout: requestTimeout, Transport: &http.Transport{DisableKeepAlives: true}},
	}
}

// run asks until ctx ends.
func (c *client) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-c.busy:
		}
		before := c.current()
		sent := time.Now()
		began, err := c.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		interval := calmInterval
		if c.note(before, sent, time.Now(), began, err) {
			interval = busyInterval
		}
		timer.Reset(interval)
	}
}

func (c *client) current() *window {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.window
}

// ask returns when the process that answers began.
func (c *client) ask(ctx context.Context) (time.Time, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return time.Time{}, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return time.Time{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return time.Time{}, fmt.Errorf("%s: %s", c.url, resp.Status)
	}
	var id struct {
		StartTime time.Time `json:"startTime"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&id); err != nil {
		return time.Time{}, err
	}
	return id.StartTime, nil
}

// note takes one request's outcome: before is the window when it was sent. It returns whether a
// restart goes on.
func (c *client) note(before *window, sent, received, began time.Time, err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	overlap := before != nil && before.overlap || c.window != nil && c.window.overlap
	if err != nil {
		switch {
		case before == nil && c.window == nil:
			c.traffic.UnansweredCalm++
			c.violateLocked("%s is not answered though nothing is being restarted: %v", sent.Format(clock), err)
		case overlap:
			c.traffic.UnansweredStartFirst++
			if len(c.overlapped) < 3 {
				c.overlapped = append(c.overlapped,
					fmt.Sprintf("%s is not answered during StartFirst: %v", sent.Format(clock), err))
			}
		default:
			c.traffic.UnansweredStopFirst++
		}
		if c.window != nil {
			c.window.asked = true
			c.window.failed++
		}
		return c.window != nil
	}
	c.traffic.Answered++
	if c.window != nil {
		if c.window.asked {
			c.window.longest = max(c.window.longest, received.Sub(c.lastAnswer))
		}
		c.window.asked = true
	}
	c.lastAnswer = received
	c.processes[began] = true
	switch {
	case began.After(c.newest):
		c.newest = began
		close(c.changed)
		c.changed = make(chan struct{})
	case began.Before(c.newest) && sent.After(c.newest) && !overlap:
		// Not an answer that was under way: both processes lived when it was asked for.
		c.violateLocked("at %s the process of %s answers, though that of %s had begun", sent.Format(clock),
			began.Format(clock), c.newest.Format(clock))
	}
	return c.window != nil
}

// clock is how moments are printed.
const clock = "15:04:05.000000"

func (c *client) violateLocked(format string, args ...any) {
	if len(c.violations) < 10 { // the first ones tell
		c.violations = append(c.violations, c.url+": "+fmt.Sprintf(format, args...))
	}
}

// open begins a window and returns when the newest process began.
func (c *client) open(overlap bool) time.Time {
	c.mu.Lock()
	c.window = &window{overlap: overlap}
	newest := c.newest
	c.mu.Unlock()
	select {
	case c.busy <- struct{}{}:
	default:
	}
	return newest
}

// shut ends the window.
func (c *client) shut() window {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := *c.window
	c.window = nil
	return w
}

// await waits until a process answers that began after t.
func (c *client) await(ctx context.Context, t time.Time) error {
	for {
		c.mu.Lock()
		newest, changed := c.newest, c.changed
		c.mu.Unlock()
		if newest.After(t) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s: no new process answers: %w", c.url, ctx.Err())
		}
	}
}

// state returns what was counted and seen.
func (c *client) state() (t traffic, processes int, violations, overlapped []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.traffic, len(c.processes), append([]string(nil), c.violations...), append([]string(nil), c.overlapped...)
}
