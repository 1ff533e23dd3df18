// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// debianPackages are what building and running the components needs beyond Go: runc is built with
// cgo against libseccomp; CNI, kubelet and port-forwarding call the rest; busybox becomes a test
// image.
func debianPackages() []string {
	return []string{"gcc", "libc6-dev", "libseccomp-dev", "pkg-config", "iproute2", "iptables", "conntrack", "socat",
		"ethtool", "mount", "busybox-static", "ca-certificates"}
}

// installPackages installs what dpkg says is missing. On a machine without dpkg it trusts that the
// tools are there.
func installPackages(ctx context.Context, log io.Writer) error {
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		return nil
	}
	missing, err := missingPackages(ctx, debianPackages())
	if err != nil || len(missing) == 0 {
		return err
	}
	began := time.Now()
	fmt.Fprintf(log, "install Debian packages %s ...\n", strings.Join(missing, " "))
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w; install the packages by hand\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	if err := run("update", "-qq"); err != nil {
		return err
	}
	if err := run(append([]string{"install", "-y", "-qq", "--no-install-recommends"}, missing...)...); err != nil {
		return err
	}
	fmt.Fprintf(log, "install Debian packages: %.1fs\n", time.Since(began).Seconds())
	return nil
}

// missingPackages returns those of names that dpkg does not list as installed.
func missingPackages(ctx context.Context, names []string) ([]string, error) {
	// dpkg-query exits 1 when it does not know a name, and still answers for the others.
	out, err := exec.CommandContext(ctx, "dpkg-query", append([]string{"-W", "-f", "${Package} ${db:Status-Status}\n"},
		names...)...).Output()
	if exited := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exited) {
		return nil, fmt.Errorf("ask dpkg for installed packages: %w", err)
	}
	installed := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		name, status, _ := strings.Cut(strings.TrimSpace(line), " ")
		installed[name] = installed[name] || status == "installed"
	}
	var missing []string
	for _, n := range names {
		if !installed[n] {
			missing = append(missing, n)
		}
	}
	return missing, nil
}
