// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package systemctl

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// Run runs systemctl.
func Run(ctx context.Context, args ...string) error {
	_, err := Command(ctx, "systemctl", args...)
	return err
}

// Show returns properties of a unit.
func Show(ctx context.Context, unit string, properties ...string) (map[string]string, error) {
	out, err := Command(ctx, "systemctl", "show", unit, "-p", strings.Join(properties, ","))
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for line := range strings.Lines(out) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			m[key] = value
		}
	}
	return m, nil
}

// Command runs a program and returns its output. The error has the output, too.
func Command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s",
			name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}
