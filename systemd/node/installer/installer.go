// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package installer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/version"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
	"github.com/cri-proxy/cri-proxy/systemd/node/install"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

const (
	// label is on nodes where the proxy is installed. Its value is "true": a version need not be a
	// valid label value.
	label = "cri-proxy.io/installed"
	// hostDir is where the binary is on the node, below the prefix. It is not the directory of the
	// installed versions, which an uninstall removes, and not below /run, from which some
	// distributions run no programs.
	hostDir = "lib/cri-proxy-installer"
	// unit runs on the node: the work goes on when the pod goes away.
	unit = "cri-proxy-installer"
)

// The actions.
const (
	Check     = "check" // print what an installation would do
	Install   = "install"
	Uninstall = "uninstall"
)

// Options say what [Run] does on the node of this pod.
type Options struct {
	// Action is Check, Install or Uninstall.
	Action string
	// Host is the root directory of the node's files.
	Host string
	// Node is the name of the node to label. Empty: set no label.
	Node string
	// Done is a file that Run writes when the node is done, for a readiness probe. Empty: none.
	Done string
	// Args are additional arguments of cri-proxy install or uninstall.
	Args []string
	// LeftOver separates arguments that cri-proxy uninstall takes from those that only
	// cri-proxy install takes: they are left over from the installation.
	LeftOver func(args []string) (kept, leftOver []string)
	// Out gets what is done, for people.
	Out io.Writer
}

// Run runs the action on the node, and then waits until ctx ends, even if the action has failed: a
// new pod is a new attempt.
func Run(ctx context.Context, o Options) error { return (&installer{Options: o}).run(ctx) }

type installer struct {
	Options
	dir string // of the binary, as the node sees it; empty if it is not there
}

func (i *installer) run(ctx context.Context) error {
	args := []string{i.Action}
	if i.Action == Check {
		args = []string{Install, "--dry-run"}
	}
	prefix, err := i.prefix()
	if err != nil {
		return err
	}
	i.dir = filepath.Join(string(prefix), hostDir)
	more := i.Args
	if i.Action == Uninstall {
		var leftOver []string
		if more, leftOver = i.LeftOver(more); len(leftOver) > 0 {
			_, _ = fmt.Fprintf(i.Out, "left out of ARGS, for they are of an install: %s\n", strings.Join(leftOver, " "))
		}
	}
	err = i.copyIn()
	switch {
	case err == nil:
		err = i.onHost(ctx, append(args, more...))
	case i.Action == Uninstall && errors.Is(err, unix.EROFS) && !i.installed(prefix):
		// The pod before this one has uninstalled it, and with it the record of the prefix, which
		// is another one.
		_, _ = fmt.Fprintln(i.Out, "cri-proxy is not installed here")
		i.dir, err = "", nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("copying this program to the node: %w; "+
			"give a directory that can be written in ARGS, such as --prefix=/opt", err)
	default:
		return fmt.Errorf("copying this program to the node: %w", err)
	}
	if err != nil {
		if i.Action != Check {
			// kubelet starts a container that ends again, and forgets its back-off when it is
			// restarted itself: that would never end.
			_, _ = fmt.Fprintf(i.Out, "%v\n%s went wrong; waiting to be stopped: "+
				"a new pod tries again\n", err, i.Action)
			<-ctx.Done()
		}
		return err
	}
	if err := i.setLabel(ctx); err != nil {
		return err
	}
	if i.Action == Uninstall && i.dir != "" {
		if err := os.RemoveAll(filepath.Join(i.Host, i.dir)); err != nil {
			return err
		}
	}
	if i.Done != "" {
		if err := os.WriteFile(i.Done, nil, 0o644); err != nil {
			return err
		}
	}
	_, _ = fmt.Fprintf(i.Out, "%s is done; waiting to be stopped\n", i.Action)
	<-ctx.Done()
	return nil
}

// prefix returns the one of the arguments, which cri-proxy install gets too, or the installed one.
func (i *installer) prefix() (update.Prefix, error) {
	for n, arg := range i.Args {
		value, ok := strings.CutPrefix(arg, "--prefix=")
		if !ok && arg == "--prefix" && n+1 < len(i.Args) {
			value, ok = i.Args[n+1], true
		}
		if ok {
			p := update.Prefix(filepath.Clean(value))
			return p, p.Check()
		}
	}
	return update.ReadPrefix(filepath.Join(i.Host, update.PrefixFile))
}

// installed reports whether something of an installation is on the node.
func (i *installer) installed(prefix update.Prefix) bool {
	return slices.ContainsFunc(install.Traces(prefix), func(path string) bool {
		_, err := os.Lstat(filepath.Join(i.Host, path))
		return !errors.Is(err, fs.ErrNotExist)
	})
}

// copyIn puts this program on the node.
func (i *installer) copyIn() error {
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer src.Close()
	return atomicfile.Copy(filepath.Join(i.Host, i.dir, "cri-proxy"), src, 0o755)
}

// onHost lets the node's systemd run the program, and passes on its output.
func (i *installer) onHost(ctx context.Context, args []string) error {
	self := filepath.Join(i.dir, "cri-proxy")
	run := append([]string{"--quiet", "--wait", "--collect", "--pipe", "--unit=" + unit, "--", self}, args...)
	program, err := i.find("systemd-run")
	if err != nil {
		return err
	}
	if err := i.idle(ctx); err != nil {
		return err
	}
	// Not killed with this process: what systemd runs goes on anyway.
	cmd := exec.CommandContext(ctx, program, run...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: i.Host}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = i.Out, i.Out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("cri-proxy %s on the node: %w", strings.Join(args, " "), err)
	}
	return nil
}

// idle waits until the node has finished what a pod before this one has begun.
func (i *installer) idle(ctx context.Context) error {
	program, err := i.find("systemctl")
	if err != nil {
		return err
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		cmd := exec.CommandContext(ctx, program, "is-active", unit)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: i.Host}
		cmd.Dir = "/"
		out, _ := cmd.Output() // it says the state by its code, too
		switch strings.TrimSpace(string(out)) {
		case "active", "activating", "deactivating":
		default:
			return ctx.Err()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// find returns where the node has a program.
func (i *installer) find(name string) (string, error) {
	for _, dir := range []string{"/usr/bin", "/bin"} {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(filepath.Join(i.Host, path)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s on the node: does it run systemd, and is the pod privileged, with hostPID?", name)
}

// setLabel labels the Node object, or removes the label.
func (i *installer) setLabel(ctx context.Context) error {
	if i.Node == "" || i.Action == Check {
		return nil
	}
	c, err := apiserver.InCluster()
	if err != nil {
		return err
	}
	defer c.Close()
	var value any // null takes it away
	if i.Action == Install {
		value = "true"
	}
	patch := map[string]any{"metadata": map[string]any{
		"labels":      map[string]any{label: value},
		"annotations": map[string]any{"cri-proxy.io/installed-version": orNil(value, version.Short())},
	}}
	if err := c.Do(ctx, http.MethodPatch, "/api/v1/nodes/"+url.PathEscape(i.Node), patch, &struct{}{}); err != nil {
		return fmt.Errorf("label of node %s: %w", i.Node, err)
	}
	return nil
}

func orNil(there any, value string) any {
	if there == nil {
		return nil
	}
	return value
}
