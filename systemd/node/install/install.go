// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/ops/prepull/runtimeconfig"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// Options say how [Run] installs the proxy.
type Options struct {
	// DryRun prints what would be done, and changes nothing.
	DryRun bool
	// Force installs even if a check fails.
	Force bool
	// NoKubelet leaves kubelet alone: its endpoint is set elsewhere, or kubelet is not set up yet.
	NoKubelet bool
	// Unit is the systemd unit of kubelet.
	Unit string
	// Kubeconfig is for asking whether the node is ready. Empty: kubelet's.
	Kubeconfig string
	// Prefix is where the binaries go. Empty: the installed prefix, or the default.
	Prefix update.Prefix
	// Timeout is how long kubelet may take until it works again.
	Timeout time.Duration
	// Config has the values of Given. Run makes it what the file is to hold.
	Config *config.Config
	// Given are flags that write into Config: settings that go into the file.
	Given config.Given
	// Out gets what is done, for people.
	Out io.Writer
}

// Run puts the proxy between kubelet and the runtime of this node. If anything fails, Run restores
// everything.
func Run(ctx context.Context, o Options) error { return (&installer{Options: o}).run(ctx) }

// installer puts the proxy on a node.
type installer struct {
	Options
	before *config.Config // what is in the file
}

func (i *installer) say(format string, args ...any) { _, _ = fmt.Fprintf(i.Out, format+"\n", args...) }

func (i *installer) warn(warnings ...string) {
	for _, w := range warnings {
		i.say("warning: %s", w)
	}
}

// kubeletSocket is the symlink that kubelet dials, and ours is the symlink as an endpoint.
func (i *installer) kubeletSocket() string { return bypass.KubeletSocket(i.Config) }
func (i *installer) ours() string          { return "unix://" + i.kubeletSocket() }

func (i *installer) run(ctx context.Context) error {
	if err := checkMachine(); err != nil {
		return err
	}
	if err := i.choosePrefix(update.PrefixFile); err != nil {
		return err
	}
	k, err := i.kubelet(ctx)
	if err != nil {
		return err
	}
	text, err := i.configure(k)
	if err != nil {
		return err
	}
	if err := i.check(ctx, k); err != nil {
		return err
	}
	p, err := i.plan(ctx, k, text)
	if err != nil {
		return err
	}
	if i.DryRun {
		p.Show()
		return nil
	}
	if err := p.Run(ctx); err != nil {
		return err
	}
	if len(p.Actions) == 0 {
		i.say("cri-proxy is installed, there is nothing to do")
	} else {
		i.say("cri-proxy is installed; see cri-proxy ctl status")
	}
	if s := bypassstate.Read(i.Config.StateDir); s != nil {
		i.say("it is bypassed %s; cri-proxy bypass off ends that", s)
	}
	return i.sayEndpoint(k)
}

// choosePrefix takes the prefix of the flag, or else the installed prefix, which file has. It does
// not move binaries.
func (i *installer) choosePrefix(file string) error {
	have, err := update.ReadPrefix(file)
	if err != nil {
		return err
	}
	if i.Prefix == "" {
		i.Prefix = have
	}
	i.Prefix = update.Prefix(filepath.Clean(string(i.Prefix)))
	if err := i.Prefix.Check(); err != nil {
		return &config.InvalidError{Err: fmt.Errorf("--prefix: %w", err)}
	}
	if i.Prefix != have && there(have.LibDir()) {
		return fmt.Errorf("cri-proxy is installed below %s: "+
			"take it off there with cri-proxy uninstall before it is installed below %s",
			have, i.Prefix)
	}
	return nil
}

// sayEndpoint says what is left to do where kubelet was left alone.
func (i *installer) sayEndpoint(k *kubelet.Kubelet) error {
	if !i.NoKubelet {
		return nil
	}
	if k != nil {
		if containers, _, err := k.Dials(i.kubeletSocket()); err != nil || containers {
			return err
		}
	}
	i.say("kubelet was left alone: its containerRuntimeEndpoint must be %s", i.ours())
	return nil
}

// kubelet finds the kubelet that is to be pointed at us.
func (i *installer) kubelet(ctx context.Context) (*kubelet.Kubelet, error) {
	k, err := kubelet.Find(ctx, i.Unit)
	switch {
	case i.NoKubelet && err != nil:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w; start it or name its unit with --kubelet-unit, "+
			"or use --no-kubelet and set its containerRuntimeEndpoint yourself", err)
	}
	return k, nil
}

// check looks at the node before anything is done.
func (i *installer) check(ctx context.Context, k *kubelet.Kubelet) error {
	runtime, err := config.SocketPath(i.Config.RuntimeEndpoint)
	if err != nil {
		return &config.InvalidError{Err: err}
	}
	var errs []error
	warnings, err := checkRuntime(ctx, runtime)
	i.warn(warnings...)
	errs = append(errs, err)
	kubelets := ""
	if k != nil {
		version, warnings, err := checkKubelet(ctx, k)
		i.warn(warnings...)
		errs = append(errs, err)
		endpoint, err := k.Endpoint()
		if err != nil {
			return err
		}
		if kubelets, err = config.SocketPath(endpoint); err != nil {
			return fmt.Errorf("kubelet's runtime endpoint: %w", err)
		}
		i.say("kubelet %s dials %s", version, endpoint)
		if kubelets == i.Config.Listen.Path && kubelets != i.kubeletSocket() {
			i.warn("kubelet dials " + kubelets + " itself, where a bypass does not reach it: " +
				"it is pointed at the symlink")
		}
		if kubelets == i.kubeletSocket() || kubelets == i.Config.Listen.Path {
			kubelets = ""
		}
	}
	if errs[0] == nil {
		errs = append(errs, checkAlone(ctx, kubelets, runtime))
		i.sayRegistries(ctx, runtime)
	}
	errs = append(errs, checkSpace(i.Prefix))
	if err := errors.Join(errs...); err != nil {
		if !i.Force {
			return err
		}
		i.warn(err.Error())
	}
	return nil
}

// sayRegistries says how images are pulled: what cri-proxy itself fetches follows the runtime's
// settings, not those of this shell.
func (i *installer) sayRegistries(ctx context.Context, runtime string) {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	conn, err := bypass.Dial(runtime)
	var s *runtimeconfig.Summary
	if err == nil {
		defer conn.Close()
		s, err = runtimeconfig.New(runtimeconfig.Options{Socket: runtime, Conn: conn, Log: quiet}).Look(ctx)
	}
	if err != nil {
		i.warn(fmt.Sprintf("how containerd reaches registries is not known, "+
			"so speed limits of pulls may not be kept: %v", err))
		return
	}
	if s.Unknown != nil {
		i.warn(fmt.Sprintf("pulls as %s", s))
		return
	}
	i.say("pulls as %s", s)
}

// plan returns what is to be done.
func (i *installer) plan(ctx context.Context, k *kubelet.Kubelet, text []byte) (*plan.Plan, error) {
	p := &plan.Plan{Out: i.Out, Undone: daemonReload}
	r, err := record.Read(record.Dir)
	if err != nil {
		return nil, err
	}
	files, err := nodeFiles(i.Config, k, i.Prefix)
	if err != nil {
		return nil, err
	}
	files = slices.Insert(files, 0, configFile(config.DefaultFile, text))
	changed := false
	for _, f := range files {
		a, ok, err := plan.Writing(f.path, f.content, f.mode)
		if err != nil {
			return nil, err
		}
		if ok {
			p.Add(a)
			changed = true
		}
	}
	version, same, err := update.Serving(ctx, i.Prefix, i.Config.StateDir, "")
	if err != nil {
		return nil, err
	}
	if changed {
		p.Add(plan.Action{What: "systemctl daemon-reload", Do: daemonReload})
	}
	if err := i.planSockets(ctx, p, changed); err != nil {
		return nil, err
	}
	i.planDaemon(p, version, same, changed)
	if k == nil || i.NoKubelet {
		return p, nil
	}
	edits, err := k.Point(i.ours())
	if err != nil {
		return nil, err
	}
	if len(edits) > 0 || r.Pending {
		w, warnings := newWatch(ctx, k, i.Unit, i.Kubeconfig, i.Timeout)
		i.warn(warnings...)
		p.Add(i.pointing(k, edits, w, r))
	}
	return p, nil
}

func daemonReload(ctx context.Context) error { return systemctl.Run(ctx, "daemon-reload") }

// planSockets makes systemd hold the sockets, and the symlinks be there.
func (i *installer) planSockets(ctx context.Context, p *plan.Plan, changed bool) error {
	if links := there(i.kubeletSocket()); !links || changed {
		a := plan.Action{What: "systemd-tmpfiles --create " + tmpfilesName, Do: func(ctx context.Context) error {
			_, err := systemctl.Command(ctx, "systemd-tmpfiles", "--create", tmpfilesName)
			return err
		}}
		if !links {
			sockets := there(i.Config.Listen.Path) // somebody may be dialling that already
			a.Undo = func(context.Context) error {
				if sockets {
					return atomicfile.Remove(i.kubeletSocket())
				}
				return removeSockets(i.Config)
			}
		}
		p.Add(a)
	}
	units := []string{criSocket, adminSocket}
	if i.Config.Ops.Address != "" {
		units = append(units, opsSocket)
	}
	for _, unit := range units {
		s, err := systemctl.Show(ctx, unit, "ActiveState", "UnitFileState")
		if err != nil {
			return err
		}
		if s["ActiveState"] == "active" && s["UnitFileState"] == "enabled" {
			continue
		}
		p.Add(plan.Action{
			What: "systemctl enable --now " + unit,
			Do: func(ctx context.Context) error {
				_ = systemctl.Run(ctx, "reset-failed", unit)
				if unit == opsSocket {
					return i.enableOpsSocket(ctx)
				}
				return systemctl.Run(ctx, "enable", "--now", unit)
			},
			Undo: func(ctx context.Context) error { return systemctl.Run(ctx, "disable", "--now", unit) },
		})
	}
	if i.Config.Ops.Address == "" {
		s, err := systemctl.Show(ctx, opsSocket, "ActiveState", "UnitFileState")
		if err != nil || s["ActiveState"] == "active" || s["UnitFileState"] == "enabled" {
			p.Add(plan.Action{What: "systemctl disable --now " + opsSocket, Do: func(ctx context.Context) error {
				return systemctl.Run(ctx, "disable", "--now", opsSocket)
			}})
		}
	}
	return nil
}

// startDropIn is for the start of the socket only.
const startDropIn = plan.RunUnitDir + "/" + opsSocket + ".d/90-start.conf"

// enableOpsSocket starts the socket while an instance serves. systemd refuses to start a socket
// whose Service= runs, so for the start Service= names the idle instance; the serving one is
// replaced next. If the serving process has the address itself, the socket comes with the next
// boot.
func (i *installer) enableOpsSocket(ctx context.Context) error {
	idle := update.Units()[0]
	s, err := systemctl.Show(ctx, idle, "ActiveState")
	if err != nil {
		return err
	}
	if s["ActiveState"] != "inactive" && s["ActiveState"] != "failed" {
		idle = update.Units()[1]
	}
	if err := atomicfile.Write(startDropIn, []byte("[Socket]\nService="+idle+"\n"), 0o644); err != nil {
		return err
	}
	if err = systemctl.Run(ctx, "daemon-reload"); err == nil {
		err = systemctl.Run(ctx, "enable", "--now", opsSocket)
	}
	if err := errors.Join(plan.Put(startDropIn, nil, 0), systemctl.Run(ctx, "daemon-reload")); err != nil {
		return err
	}
	if err != nil && i.before.Ops.Address != "" {
		i.warn("the process that serves has " + i.before.Ops.Address + " itself: systemd has it from the next boot on")
		return systemctl.Run(ctx, "enable", opsSocket)
	}
	return err
}

// planDaemon makes this version serve. version is the one that serves now, empty for none.
func (i *installer) planDaemon(p *plan.Plan, version string, same, changed bool) {
	do := func(reload bool) func(context.Context) error {
		return func(ctx context.Context) error {
			return update.Run(ctx, update.Options{
				Prefix: i.Prefix, Config: config.DefaultFile, Reload: reload, Out: i.Out,
			})
		}
	}
	switch fresh := !there(filepath.Join(i.Prefix.LibDir(), "versions")); {
	case version == "":
		p.Add(plan.Action{
			What: "install this version and start it",
			Do: func(ctx context.Context) error {
				if fresh { // a bypass is left over from a time before
					if err := bypassstate.Forget(i.Config.StateDir); err != nil {
						return err
					}
				}
				return do(false)(ctx)
			},
			Undo: func(ctx context.Context) error {
				if !fresh {
					return nil
				}
				return removeDaemon(ctx, i.Config, i.Prefix)
			},
		})
	case !same:
		p.Add(plan.Action{What: "put this version in the place of " + version, Do: do(false)})
	case changed:
		p.Add(plan.Action{What: "have another process take over, with the new configuration", Do: do(true)})
	}
}
