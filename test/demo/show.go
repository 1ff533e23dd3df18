// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// kubectl runs kubectl and shows what a person would type and see.
func (d *demo) kubectl(ctx context.Context, stdin string, args ...string) error {
	cmd := d.kubectlCommand(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return d.show(cmd)
}

// kubectlCommand shows a command of kubectl and returns it.
func (d *demo) kubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	d.say("$ kubectl %s", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, filepath.Join(d.bed.Bin, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+d.bed.Kubeconfig, "HOME="+d.bed.Dir)
	return cmd
}

func (d *demo) exec(ctx context.Context, program string, args ...string) error {
	d.say("$ %s %s", filepath.Base(program), strings.Join(args, " "))
	return d.show(exec.CommandContext(ctx, program, args...))
}

func (d *demo) show(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	_, _ = indent{d.out}.Write(out)
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return nil
}

func (d *demo) heading(s string) { _, _ = fmt.Fprintf(d.out, "\n── %s\n\n", s) }

func (d *demo) say(format string, args ...any) {
	_, _ = indent{d.out}.Write([]byte(fmt.Sprintf(format, args...) + "\n"))
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(100 * time.Millisecond)
}

// indent sets whole lines off from the headings.
type indent struct{ w io.Writer }

func (i indent) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if _, err := io.WriteString(i.w, "   "+line); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}
