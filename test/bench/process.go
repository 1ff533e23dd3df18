// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// process is one role in a process of its own. It answers one JSON line on
// stdout for each on stdin and ends when stdin does.
type process struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

// start starts this command in a role and waits until it says that it is ready.
func start(ctx context.Context, role ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{name: role[0], cmd: exec.CommandContext(ctx, self, append([]string{"role"}, role...)...)}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReaderSize(out, 1<<20)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	var ready string
	if err := p.read(&ready); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *process) read(answer any) error {
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return json.Unmarshal(line, answer)
}

// ask sends a question and waits for the answer.
func (p *process) ask(question, answer any) error {
	if err := json.NewEncoder(p.in).Encode(question); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return p.read(answer)
}

// used is what a process has used so far.
type used struct {
	CPU time.Duration `json:"cpu"` // user and system
}

func (p *process) used() (used, error) {
	var u used
	err := p.ask("used", &u)
	return u, err
}

// stop ends the process and waits for it.
func (p *process) stop() {
	p.in.Close()
	_ = p.cmd.Wait()
}
