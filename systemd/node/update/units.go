// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// instances are the two of cri-proxy@.service.
func instances() [2]string { return [2]string{"a", "b"} }

func unit(instance string) string { return "cri-proxy@" + instance + ".service" }

func other(instance string) string {
	if i := instances(); instance == i[0] {
		return i[1]
	}
	return instances()[0]
}

// unitState is what systemd says of an instance.
type unitState struct {
	active string // active, activating, deactivating, inactive, failed
	pid    int
	status string
}

func (u unitState) runs() bool {
	return u.pid != 0 || u.active == "activating" || u.active == "deactivating"
}

func systemctl(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

func stateOf(ctx context.Context, instance string) (unitState, error) {
	out, err := systemctl(ctx, "show", unit(instance), "-p", "ActiveState,MainPID,StatusText")
	if err != nil {
		return unitState{}, err
	}
	var u unitState
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "ActiveState":
			u.active = value
		case "MainPID":
			u.pid, _ = strconv.Atoi(value)
		case "StatusText":
			u.status = value
		}
	}
	return u, nil
}
