// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package update

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

const (
	// checkTimeout bounds the checks of a new binary before it may serve.
	checkTimeout = 20 * time.Second
	// tidyTimeout bounds the commands that restore everything after a failure.
	tidyTimeout = time.Minute
)

// DefaultTimeout is how long a new process may take to serve.
const DefaultTimeout = 5 * time.Minute

// Options say how [Run] replaces the running version.
type Options struct {
	Prefix Prefix // of the installation
	Binary string // the new version; empty: this program
	Config string // configuration file of the daemon
	// Back goes back to the previous version.
	Back bool
	// EndDrain cuts the calls that still run in the old instance since the last update.
	EndDrain bool
	// Reload lets the same version take over from itself.
	Reload bool
	// Timeout is how long the new instance may take to serve. 0: [DefaultTimeout].
	Timeout time.Duration
	Out     io.Writer // what is done, for people
}

// Run replaces the version that serves, or starts one where none does.
func Run(ctx context.Context, o Options) error {
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	return (&update{layout: o.Prefix.layout(), Options: o}).run(ctx)
}

// Serving returns the version that serves, empty if none does, and whether the binary is the same.
// An empty binary is this program.
func Serving(ctx context.Context, prefix Prefix, stateDir, binary string) (version string, same bool, err error) {
	u := update{layout: prefix.layout(), Options: Options{Binary: binary}}
	i, err := u.serving(ctx, stateDir)
	if err != nil || i == "" {
		return "", false, err
	}
	if binary, err = u.program(); err != nil {
		return "", false, err
	}
	here, err := digest(binary)
	if err != nil {
		return "", false, err
	}
	there, err := digest(filepath.Join(u.instance(i), "cri-proxy"))
	return u.of(i), here == there, err
}

// Units are those of the instances.
func Units() []string {
	var out []string
	for _, i := range instances() {
		out = append(out, unit(i))
	}
	return out
}

// update is one run.
type update struct {
	layout
	Options
}

func (u *update) say(format string, args ...any) { _, _ = fmt.Fprintf(u.Out, format+"\n", args...) }

func (u *update) run(ctx context.Context) error {
	c := config.Default()
	if err := c.Load(u.Config, nil); err != nil {
		return err
	}
	serving, err := u.serving(ctx, c.StateDir)
	if err != nil {
		return err
	}
	idle := instances()[0]
	if serving != "" {
		idle = other(serving)
	}
	if err := u.free(ctx, idle); err != nil {
		return err
	}
	before := u.of(idle)
	version := before
	switch {
	case u.Back && (serving == "" || before == ""):
		return errors.New("there is no version to go back to")
	case !u.Back:
		if version, err = u.add(ctx); err != nil {
			return err
		}
	}
	if serving != "" && version == u.of(serving) && !u.Reload {
		u.say("%s runs already, as %s", version, unit(serving))
		return nil
	}
	if err := u.use(idle, version); err != nil {
		return err
	}
	if err := u.start(ctx, idle, c.StateDir); err != nil {
		return errors.Join(err, u.putBack(ctx, idle, before, serving, c.StateDir))
	}
	if serving == "" {
		u.say("%s serves, as %s", version, unit(idle))
	} else {
		u.say("%s serves, as %s; %s finishes its calls", version, unit(idle), unit(serving))
	}
	// The new version starts with the machine, and is what people call.
	if err := systemctl.Run(ctx, "enable", unit(idle)); err != nil {
		return err
	}
	if serving != "" {
		if err := systemctl.Run(ctx, "disable", unit(serving)); err != nil {
			return err
		}
	}
	return errors.Join(link(u.binary(version), u.bin), u.tidy())
}

// serving returns the instance that has the state, "" if there is none.
func (u *update) serving(ctx context.Context, stateDir string) (string, error) {
	conn, err := takeover.Dial(ctx, stateDir)
	if err != nil {
		return "", err
	}
	if conn == nil {
		for _, i := range instances() {
			if s, err := stateOf(ctx, i); err != nil || s.active == "activating" {
				return "", errors.Join(err, fmt.Errorf("%s is starting, or fails to: see journalctl -u %s; "+
					"cri-proxy bypass on takes it out of kubelet's path", unit(i), unit(i)))
			}
		}
		return "", nil
	}
	defer conn.Close()
	pid, err := conn.PID()
	if err != nil {
		return "", err
	}
	for _, i := range instances() {
		s, err := stateOf(ctx, i)
		if err != nil {
			return "", err
		}
		if s.pid == pid {
			return i, nil
		}
	}
	return "", fmt.Errorf("process %d serves, which is neither %s nor %s: stop it first",
		pid, unit(instances()[0]), unit(instances()[1]))
}

// free makes sure that the instance does not run, so that the new version can start in it.
func (u *update) free(ctx context.Context, instance string) error {
	s, err := stateOf(ctx, instance)
	if err != nil || !s.runs() {
		return err
	}
	if !u.EndDrain {
		return fmt.Errorf("%s still runs (%s): wait until its calls are over, or cut them with --end-drain",
			unit(instance), s.status)
	}
	u.say("stopping %s (%s)", unit(instance), s.status)
	return systemctl.Run(ctx, "stop", unit(instance))
}

// program is the new binary.
func (u *update) program() (string, error) {
	if u.Binary == "" {
		return os.Executable()
	}
	return filepath.Abs(u.Binary)
}

// add checks and installs the new binary.
func (u *update) add(ctx context.Context) (version string, err error) {
	binary, err := u.program()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	says, err := exec.CommandContext(ctx, binary, "version").Output()
	fields := strings.Fields(string(says))
	if err != nil || len(fields) < 2 || fields[0] != "cri-proxy" {
		return "", fmt.Errorf("%s is no cri-proxy that runs here (%w): %.100q", binary, err, says)
	}
	if out, err := exec.CommandContext(ctx, binary, "config", "check", u.Config).CombinedOutput(); err != nil {
		return "", fmt.Errorf("the new version does not take the configuration: %s", strings.TrimSpace(string(out)))
	}
	return u.install(binary, strings.TrimSuffix(fields[1], ","))
}

// start starts the instance and makes sure that it serves.
func (u *update) start(ctx context.Context, instance, stateDir string) error {
	_ = systemctl.Run(ctx, "reset-failed", unit(instance)) // it may not have been loaded before
	if err := systemctl.Run(ctx, "start", unit(instance)); err != nil {
		return fmt.Errorf("%w; see journalctl -u %s", err, unit(instance))
	}
	now, err := u.serving(ctx, stateDir)
	if err == nil && now != instance {
		err = fmt.Errorf("%s runs, but %q serves; see journalctl -u %s", unit(instance), now, unit(instance))
	}
	return err
}

// putBack restores everything after a failed start.
func (u *update) putBack(ctx context.Context, instance, version, serving, stateDir string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	err := systemctl.Run(ctx, "stop", unit(instance))
	err = errors.Join(err, u.use(instance, version), u.tidy())
	if serving == "" {
		return err
	}
	now, serr := u.serving(ctx, stateDir)
	if now == serving {
		u.say("%s serves on", unit(serving))
	} else {
		serr = errors.Join(serr, fmt.Errorf("%s does not serve any more; see journalctl -u %s",
			unit(serving), unit(serving)))
	}
	return errors.Join(err, serr)
}
