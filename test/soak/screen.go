// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/term"
)

// screen prints lines, and on a terminal keeps a bar below them.
type screen struct {
	terminal bool

	mu  sync.Mutex // guards all following fields
	w   io.Writer
	bar string
}

func newScreen(w io.Writer) *screen {
	f, ok := w.(*os.File)
	return &screen{w: w, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// line prints a line above the bar.
func (s *screen) line(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eraseLocked()
	fmt.Fprintf(s.w, format+"\n", args...)
	_, _ = io.WriteString(s.w, s.bar)
}

// progress redraws the bar; done is between 0 and 1. Without a terminal it does nothing.
func (s *screen) progress(done float64, text string) {
	if !s.terminal {
		return
	}
	const width = 30
	full := int(min(max(done, 0), 1) * width)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eraseLocked()
	s.bar = fmt.Sprintf("[%s%s] %3.0f %%  %s", strings.Repeat("=", full), strings.Repeat(" ", width-full), 100*done,
		text)
	_, _ = io.WriteString(s.w, s.bar)
}

// clear removes the bar.
func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eraseLocked()
	s.bar = ""
}

func (s *screen) eraseLocked() {
	if s.bar != "" {
		_, _ = io.WriteString(s.w, "\r\x1b[K")
	}
}
