// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

// operationTimeout is how long operations may take to end.
const operationTimeout = 30 * time.Second

// UninstallOptions say how [Uninstall] removes the proxy.
type UninstallOptions struct {
	// DryRun prints what would be done, and changes nothing.
	DryRun bool
	// Force cancels running operations.
	Force bool
	// Purge also removes the configuration and the journal.
	Purge bool
	// NoKubelet leaves kubelet alone, which must no longer dial the proxy.
	NoKubelet bool
	// Unit is the systemd unit of kubelet.
	Unit string
	// Kubeconfig is for asking whether the node is ready. Empty: kubelet's.
	Kubeconfig string
	// Prefix is where the binaries are. Empty: the installed prefix. Another one is refused.
	Prefix update.Prefix
	// Timeout is how long kubelet may take until it works again.
	Timeout time.Duration
	// Out gets what is done, for people.
	Out io.Writer
}

// Uninstall leads kubelet past the proxy, restores kubelet's configuration, and removes the proxy
// from this node.
func Uninstall(ctx context.Context, o UninstallOptions) error {
	return (&uninstaller{UninstallOptions: o}).run(ctx)
}

// uninstaller removes the proxy from a node.
type uninstaller struct {
	UninstallOptions
	config *config.Config
}

func (u *uninstaller) say(format string, args ...any) {
	_, _ = fmt.Fprintf(u.Out, format+"\n", args...)
}

func (u *uninstaller) run(ctx context.Context) error {
	if err := checkMachine(); err != nil {
		return err
	}
	if err := u.open(); err != nil {
		return err
	}
	p, err := u.plan(ctx)
	if err != nil {
		return err
	}
	u.warnOfOverrides(ctx)
	if u.DryRun {
		p.Show()
		return nil
	}
	if err := p.Run(ctx); err != nil {
		return fmt.Errorf("%w; cri-proxy uninstall goes on where this ended", err)
	}
	if len(p.Actions) == 0 {
		u.say("cri-proxy is not installed here")
		return nil
	}
	u.say("cri-proxy is removed")
	if !u.Purge {
		u.say("kept: %s and %s; --purge removes them", config.DefaultFile, u.config.StateDir)
	}
	return nil
}

// open reads the configuration. If there is none, or no good one, the defaults serve. The prefix
// must be known.
func (u *uninstaller) open() (err error) {
	if err := u.choosePrefix(update.PrefixFile); err != nil {
		return err
	}
	u.config = config.Default()
	err = u.config.Load(config.DefaultFile, nil)
	if err == nil {
		err = errors.Join(u.config.Complete(), u.config.Validate())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.say("warning: %v", err)
	}
	return nil
}

// choosePrefix takes the installed prefix, which file has. The flag must be the same. Without the
// file the flag says where to look first: the file may have been lost, or an uninstall has removed
// everything.
func (u *uninstaller) choosePrefix(file string) error {
	have, err := update.ReadPrefix(file)
	if err != nil {
		return err
	}
	asked := u.Prefix
	u.Prefix = have
	if asked == "" {
		return nil
	}
	asked = update.Prefix(filepath.Clean(string(asked)))
	if err := asked.Check(); err != nil {
		return &config.InvalidError{Err: fmt.Errorf("--prefix: %w", err)}
	}
	switch {
	case asked == have:
	case there(file):
		return fmt.Errorf("cri-proxy is installed below %s, as %s says, and not below %s: leave --prefix out",
			have, file, asked)
	case there(asked.LibDir()):
		u.Prefix = asked
	}
	return nil
}

// warnOfOverrides says which images will not stay.
func (u *uninstaller) warnOfOverrides(ctx context.Context) {
	if _, err := os.Stat(u.config.AdminSocket); err != nil {
		return
	}
	// The socket may be there without a daemon, and a call would start one.
	if _, _, err := update.Serving(ctx, u.Prefix, u.config.StateDir, ""); err != nil {
		return
	}
	conn, err := bypass.Dial(u.config.AdminSocket)
	if err != nil {
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := opsv1.NewOpsClient(conn).ListOverrides(ctx, &opsv1.ListOverridesRequest{})
	if err != nil {
		return
	}
	for _, o := range l.GetOverrides() {
		u.say("warning: container %s of %s/%s runs %s; kubelet makes the next one with its spec's image",
			o.GetContainer(), o.GetPod().GetNamespace(), o.GetPod().GetName(), o.GetImage())
	}
}

func (u *uninstaller) plan(ctx context.Context) (*plan.Plan, error) {
	p := &plan.Plan{Out: u.Out}
	r, err := record.Read(record.Dir)
	if err != nil {
		return nil, err
	}
	socket := bypass.KubeletSocket(u.config)
	if there(socket) && there(u.config.StateDir) {
		p.Add(plan.Action{What: "lead kubelet past cri-proxy", Do: func(ctx context.Context) error {
			path, err := bypass.Of(u.config, u.Out)
			if err != nil {
				return err
			}
			return path.On(ctx, bypass.Options{
				Reason: "cri-proxy uninstall", Force: u.Force, Wait: operationTimeout, Anyway: true,
			})
		}})
	}
	if !u.NoKubelet {
		if err := u.planKubelet(ctx, p, r); err != nil {
			return nil, err
		}
	}
	installed, err := u.installed()
	if err != nil {
		return nil, err
	}
	if len(installed) > 0 {
		what := "stop and remove " + strings.Join(installed, ", ")
		p.Add(plan.Action{What: what, Do: func(ctx context.Context) error {
			return removeAll(ctx, u.config, u.Prefix)
		}})
	}
	if u.holds(ctx, len(installed) > 0 || there(update.PrefixFile)) {
		p.Add(plan.Action{What: "take our pins and leases off the runtime's images, which stay", Do: u.letGo})
	}
	if r.Exists() {
		p.Add(plan.Action{What: "remove " + r.Dir, Do: func(context.Context) error { return r.Forget() }})
	}
	if there(update.PrefixFile) {
		// Another try must know where the rest is.
		p.Add(plan.Action{What: "remove " + update.PrefixFile, Do: func(context.Context) error {
			return plan.Put(update.PrefixFile, nil, 0)
		}})
	}
	if u.Purge {
		for _, dir := range []string{filepath.Dir(config.DefaultFile), u.config.StateDir} {
			if dir != filepath.Dir(config.DefaultFile) && dir != config.Default().StateDir {
				u.say("kept: %s, which is no directory of ours by its name: remove it by hand", dir)
				continue
			}
			if there(dir) {
				p.Add(plan.Action{What: "remove " + dir, Do: func(context.Context) error { return os.RemoveAll(dir) }})
			}
		}
	}
	return p, nil
}

// runtimeTimeout bounds what is asked of the runtime here: labels of its images and leases.
const runtimeTimeout = 30 * time.Second

// holds reports whether the runtime may keep images because of us. Without the daemon, which looks
// at the clock, a pinned image stays pinned for ever.
func (u *uninstaller) holds(ctx context.Context, installed bool) bool {
	conn, err := u.dialRuntime()
	if err != nil {
		return installed
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	h, err := prepull.Holds(ctx, conn)
	if err != nil {
		return installed // then it is said what could not be done
	}
	return installed || h.Any() // a pull may just be about to end
}

// letGo removes our pins and leases, when no process of ours runs any more. If the runtime does not
// answer, the uninstall goes on.
func (u *uninstaller) letGo(ctx context.Context) error {
	conn, err := u.dialRuntime()
	if err != nil {
		return err
	}
	defer conn.Close()
	asking, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	h, err := prepull.LetGo(asking, conn)
	if h.Any() {
		u.say("taken off: %s", h)
	}
	if err != nil {
		u.say("warning: the runtime may keep images that cri-proxy has pinned: %v; when it answers, "+
			"run cri-proxy uninstall once more, from any copy of the program", err)
	}
	if there(u.config.StateDir) {
		return prepull.ForgetPins(u.config.StateDir)
	}
	return nil
}

func (u *uninstaller) dialRuntime() (*grpc.ClientConn, error) {
	socket, err := config.SocketPath(u.config.RuntimeEndpoint)
	if err != nil {
		return nil, err
	}
	return bypass.Dial(socket)
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// planKubelet makes kubelet dial the runtime again.
func (u *uninstaller) planKubelet(ctx context.Context, p *plan.Plan, r *record.Record) error {
	if r.Unit != "" {
		u.Unit = r.Unit
	}
	k, err := kubelet.Find(ctx, u.Unit)
	if err != nil {
		if rerr := u.refuse(ctx, r, err); rerr != nil {
			return rerr
		}
		u.say("warning: %v: see to it yourself that it does not dial %s", err, bypass.KubeletSocket(u.config))
		k = nil
	}
	var diffs strings.Builder
	var paths []string
	for _, f := range r.Files {
		now, was, ok, err := r.Original(f)
		if err != nil {
			return err
		}
		if ok {
			diffs.WriteString(plan.Diff(f.Path, now, was))
			paths = append(paths, f.Path)
		}
	}
	var edits []kubelet.Edit
	if len(paths) == 0 && k != nil { // set up by hand, or changed since
		if edits, err = u.pointAway(k); err != nil {
			return err
		}
		for _, e := range edits {
			diffs.WriteString(plan.Diff(e.Path, e.Before, e.After))
			paths = append(paths, e.Path)
		}
	}
	if len(paths) == 0 && !r.Exists() { // otherwise it may still run with what was there before
		return nil
	}
	w, warnings := newWatch(ctx, k, u.Unit, u.Kubeconfig, u.Timeout)
	for _, warning := range warnings {
		u.say("warning: %s", warning)
	}
	what := "kubelet's files are as they were; restart " + u.Unit
	if len(paths) > 0 {
		what = "put kubelet's files back as they were: " + strings.Join(paths, ", ") + "; restart " + u.Unit
	}
	p.Add(plan.Action{What: what, Diff: diffs.String(), Do: func(ctx context.Context) error {
		if r.Exists() {
			r.Pending = true
			if err := r.Write(); err != nil {
				return err
			}
		}
		if _, err := r.Restore(); err != nil {
			return err
		}
		for _, e := range edits {
			if err := atomicfile.Write(e.Path, e.After, e.Mode); err != nil {
				return err
			}
		}
		if k == nil {
			return systemctl.Run(ctx, "daemon-reload")
		}
		if err := w.restart(ctx); err != nil {
			return err
		}
		return u.away(ctx)
	}})
	return nil
}

// refuse returns an error if kubelet, which does not run now (found), may dial the removed socket
// when it is started again. Its process would tell where its configuration is; the record tells it
// too, unless the configuration has been moved since.
func (u *uninstaller) refuse(ctx context.Context, r *record.Record, found error) error {
	if !errors.Is(found, kubelet.ErrNotRunning) {
		return nil
	}
	if r.Exists() {
		path, err := r.Astray()
		if err != nil || path == "" {
			return err
		}
		found = fmt.Errorf("%w, and %s, which told it what to dial, does so no more", found, path)
	}
	installed, err := u.installed()
	if err != nil || len(installed) == 0 {
		return err
	}
	s, err := systemctl.Show(ctx, u.Unit, "LoadState")
	if err != nil || s["LoadState"] != "loaded" {
		return err
	}
	return fmt.Errorf("%w: start kubelet first, so that its configuration can be put back, "+
		"or give cri-proxy uninstall --no-kubelet if it does not use cri-proxy", found)
}

// pointAway returns the edits that make a kubelet that dials the proxy dial the runtime.
func (u *uninstaller) pointAway(k *kubelet.Kubelet) ([]kubelet.Edit, error) {
	for _, socket := range []string{bypass.KubeletSocket(u.config), u.config.Listen.Path} {
		containers, images, err := k.Dials(socket)
		if err != nil {
			return nil, err
		}
		if containers || images {
			return k.Point(u.config.RuntimeEndpoint)
		}
	}
	return nil, nil
}

// away makes sure that kubelet does not dial the sockets, which are removed next.
func (u *uninstaller) away(ctx context.Context) error {
	k, err := kubelet.Find(ctx, u.Unit)
	if err != nil {
		return err
	}
	edits, err := u.pointAway(k)
	if err != nil || len(edits) == 0 {
		return err
	}
	for _, e := range edits { // the files of before were pointed at us, too
		if err := atomicfile.Write(e.Path, e.After, e.Mode); err != nil {
			return err
		}
	}
	w, _ := newWatch(ctx, k, u.Unit, u.Kubeconfig, u.Timeout)
	return w.restart(ctx)
}
