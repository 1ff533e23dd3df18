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

	"github.com/spf13/cobra"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
)

const (
	// checkPatience bounds what a new binary is asked before it may serve.
	checkPatience = 20 * time.Second
	// tidyPatience bounds the commands that put things back after a failure.
	tidyPatience = time.Minute
)

// Command returns `cri-proxy upgrade`.
func Command() *cobra.Command {
	u := upgrade{}
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Put another version in the place of the one that runs, without a failed call",
		Long: `Put another version in the place of the one that runs: the instance of
cri-proxy@.service that is idle is started with it and takes over. Calls that
take long, such as image pulls, end in the old one. If the new one does not get
as far as serving, the old one serves on as if nothing had been.

Where none runs the binary is installed and started. With --reload the same
version takes over from itself, which takes up a changed configuration.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			u.out = c.OutOrStdout()
			prefix, err := ReadPrefix(PrefixFile)
			if err != nil {
				return err
			}
			u.layout = prefix.layout()
			ctx, cancel := context.WithTimeout(c.Context(), u.timeout)
			defer cancel()
			return u.run(ctx)
		},
	}
	f := cmd.Flags()
	f.StringVar(&u.binary, "binary", "", "the new version (default: this one)")
	f.BoolVar(&u.back, "back", false, "go back to the version before")
	f.BoolVar(&u.endDrain, "end-drain", false, "cut the calls that are still under way from the upgrade before this one")
	f.BoolVar(&u.reload, "reload", false, "also if this version runs already: it takes up a changed configuration or unit")
	f.StringVar(&u.config, "config", config.DefaultFile, "configuration of the daemon")
	f.DurationVar(&u.timeout, "timeout", DefaultTimeout, "for the new one to serve; it waits for operations that stop containers")
	cmd.MarkFlagsMutuallyExclusive("binary", "back")
	cmd.MarkFlagsMutuallyExclusive("reload", "back")
	return cmd
}

// DefaultTimeout is how long a new process may take to serve.
const DefaultTimeout = 5 * time.Minute

// Options of [Run].
type Options struct {
	Prefix Prefix // of the installation
	Binary string // the new version, empty is this program
	Config string // file of the daemon
	// Reload has the same version take over from itself.
	Reload bool
	Out    io.Writer // what is done, for people
}

// Run puts a version in the place of the one that serves, or starts it where none does, as `cri-proxy upgrade` does.
func Run(ctx context.Context, o Options) error {
	u := upgrade{layout: o.Prefix.layout(), binary: o.Binary, config: o.Config, reload: o.Reload, out: o.Out}
	ctx, cancel := context.WithTimeout(ctx, DefaultTimeout)
	defer cancel()
	return u.run(ctx)
}

// Serving returns the version that serves, empty if none does, and whether it is that of the binary, empty for this program.
func Serving(ctx context.Context, prefix Prefix, stateDir, binary string) (version string, same bool, err error) {
	u := upgrade{layout: prefix.layout(), binary: binary}
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

type upgrade struct {
	layout
	binary, config         string
	back, endDrain, reload bool
	timeout                time.Duration
	out                    io.Writer
}

func (u *upgrade) say(format string, args ...any) { _, _ = fmt.Fprintf(u.out, format+"\n", args...) }

func (u *upgrade) run(ctx context.Context) error {
	c := config.Default()
	if err := c.Load(u.config, nil); err != nil {
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
	case u.back && (serving == "" || before == ""):
		return errors.New("there is no version to go back to")
	case !u.back:
		if version, err = u.add(ctx); err != nil {
			return err
		}
	}
	if serving != "" && version == u.of(serving) && !u.reload {
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
		u.say("%s serves, as %s; %s ends its calls", version, unit(idle), unit(serving))
	}
	// What starts with the machine, and what people call, is the new one.
	if _, err := systemctl(ctx, "enable", unit(idle)); err != nil {
		return err
	}
	if serving != "" {
		if _, err := systemctl(ctx, "disable", unit(serving)); err != nil {
			return err
		}
	}
	return errors.Join(link(u.layout.binary(version), u.bin), u.tidy())
}

// serving returns the instance that has the state, "" if there is none.
func (u *upgrade) serving(ctx context.Context, stateDir string) (string, error) {
	conn, err := takeover.Dial(ctx, stateDir)
	if err != nil {
		return "", err
	}
	if conn == nil {
		for _, i := range instances() {
			if s, err := stateOf(ctx, i); err != nil || s.active == "activating" {
				return "", errors.Join(err, fmt.Errorf("%s is starting, or fails to: see journalctl -u %s; cri-proxy bypass on takes it out of kubelet's path", unit(i), unit(i)))
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
	return "", fmt.Errorf("process %d serves, which is neither %s nor %s: stop it first", pid, unit(instances()[0]), unit(instances()[1]))
}

// free makes sure that the instance does not run.
func (u *upgrade) free(ctx context.Context, instance string) error {
	s, err := stateOf(ctx, instance)
	if err != nil || !s.runs() {
		return err
	}
	if !u.endDrain {
		return fmt.Errorf("%s still runs (%s): wait until its calls are over, or cut them with --end-drain", unit(instance), s.status)
	}
	u.say("stopping %s (%s)", unit(instance), s.status)
	_, err = systemctl(ctx, "stop", unit(instance))
	return err
}

// program is the new binary.
func (u *upgrade) program() (string, error) {
	if u.binary == "" {
		return os.Executable()
	}
	return filepath.Abs(u.binary)
}

// add checks and installs the new binary.
func (u *upgrade) add(ctx context.Context) (version string, err error) {
	binary, err := u.program()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, checkPatience)
	defer cancel()
	says, err := exec.CommandContext(ctx, binary, "version").Output()
	fields := strings.Fields(string(says))
	if err != nil || len(fields) < 2 || fields[0] != "cri-proxy" {
		return "", fmt.Errorf("%s is no cri-proxy that runs here (%w): %.100q", binary, err, says)
	}
	if out, err := exec.CommandContext(ctx, binary, "config", "check", u.config).CombinedOutput(); err != nil {
		return "", fmt.Errorf("the new version does not take the configuration: %s", strings.TrimSpace(string(out)))
	}
	return u.install(binary, strings.TrimSuffix(fields[1], ","))
}

// start starts the instance and makes sure that it serves.
func (u *upgrade) start(ctx context.Context, instance, stateDir string) error {
	_, _ = systemctl(ctx, "reset-failed", unit(instance)) // it may not have been loaded before
	if _, err := systemctl(ctx, "start", unit(instance)); err != nil {
		return fmt.Errorf("%w; see journalctl -u %s", err, unit(instance))
	}
	now, err := u.serving(ctx, stateDir)
	if err == nil && now != instance {
		err = fmt.Errorf("%s runs, but %q serves; see journalctl -u %s", unit(instance), now, unit(instance))
	}
	return err
}

// putBack makes everything what it was.
func (u *upgrade) putBack(ctx context.Context, instance, version, serving, stateDir string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyPatience)
	defer cancel()
	_, err := systemctl(ctx, "stop", unit(instance))
	err = errors.Join(err, u.use(instance, version), u.tidy())
	if serving == "" {
		return err
	}
	now, serr := u.serving(ctx, stateDir)
	if now == serving {
		u.say("%s serves on", unit(serving))
	} else {
		serr = errors.Join(serr, fmt.Errorf("%s does not serve any more; see journalctl -u %s", unit(serving), unit(serving)))
	}
	return errors.Join(err, serr)
}
