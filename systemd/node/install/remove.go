// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// ownFiles are all files of ours that may be there, except the configuration, the state and the
// prefix file.
func ownFiles(prefix update.Prefix) []string {
	out := []string{filepath.Join(tmpfilesDir, tmpfilesName), guardFile(prefix), prefix.BinLink()}
	for _, name := range []string{criSocket, adminSocket, opsSocket, serviceTemplate} {
		out = append(out, filepath.Join(plan.UnitDir, name), filepath.Join(plan.UnitDir, name+".d", dropInName))
	}
	return out
}

// Traces are the files and directories that show that the proxy is installed, or that an uninstall
// has not finished.
func Traces(prefix update.Prefix) []string {
	return append(ownFiles(prefix), prefix.LibDir(), record.Dir, update.PrefixFile)
}

// installed lists what of ours is there.
func (u *uninstaller) installed() ([]string, error) {
	var out []string
	sockets, err := bypass.RuntimeFiles(u.config)
	if err != nil {
		return nil, err
	}
	for _, f := range slices.Concat(ownFiles(u.Prefix), []string{u.Prefix.LibDir()}, sockets) {
		switch _, err := os.Lstat(f); {
		case err == nil:
			out = append(out, f)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	return out, nil
}

// removeDaemon stops the instances and removes the binaries.
func removeDaemon(ctx context.Context, c *config.Config, prefix update.Prefix) error {
	var errs []error
	for _, unit := range update.Units() {
		// An instance whose unit is gone has nothing to stop.
		if s, err := systemctl.Show(ctx, unit, "LoadState"); err != nil || s["LoadState"] == "not-found" {
			continue
		}
		errs = append(errs, systemctl.Run(ctx, "disable", "--now", unit))
		_ = systemctl.Run(ctx, "reset-failed", unit)
	}
	return errors.Join(append(errs,
		atomicfile.Remove(prefix.BinLink()), os.RemoveAll(prefix.LibDir()), bypassstate.Forget(c.StateDir))...)
}

// removeAll stops everything and removes it. The sockets go first: a call would start an instance.
func removeAll(ctx context.Context, c *config.Config, prefix update.Prefix) error {
	var errs []error
	for _, unit := range []string{criSocket, adminSocket, opsSocket} {
		if s, err := systemctl.Show(ctx, unit, "LoadState"); err != nil || s["LoadState"] == "not-found" {
			continue
		}
		errs = append(errs, systemctl.Run(ctx, "disable", unit))
	}
	// Stopping a socket with a service that runs stops neither for good: both in one go.
	units := append([]string{"stop", criSocket, adminSocket, opsSocket}, update.Units()...)
	_ = systemctl.Run(ctx, units...) // one that is not loaded is an error
	errs = append(errs, removeDaemon(ctx, c, prefix))
	errs = append(errs, removeSockets(c))
	for _, f := range ownFiles(prefix) {
		errs = append(errs, plan.Put(f, nil, 0))
	}
	return errors.Join(append(errs, systemctl.Run(ctx, "daemon-reload"))...)
}

// removeSockets removes the sockets and the symlinks. Their directory goes if nothing else is in
// it.
func removeSockets(c *config.Config) error {
	files, err := bypass.RuntimeFiles(c)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		errs = append(errs, atomicfile.Remove(f))
	}
	_ = os.Remove(filepath.Dir(c.Listen.Path))
	return errors.Join(errs...)
}
