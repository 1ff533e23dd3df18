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
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/version"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
	command "github.com/cri-proxy/cri-proxy/systemd/node/install"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

const (
	// label is on nodes where the proxy is; its value says nothing more, since versions need not be label values.
	label = "cri-proxy.io/installed"
	// hostDir is where the binary is on the node, below its prefix. Not below that of the installed versions, which an uninstall removes,
	// and not below /run, from which some distributions run no programs.
	hostDir = "lib/cri-proxy-installer"
	// unit is the node's: the work goes on when the pod goes away.
	unit = "cri-proxy-installer"
)

// The actions.
const (
	check     = "check"
	install   = "install"
	uninstall = "uninstall"
)

// Command returns `cri-proxy installer`, which is for pods only.
func Command() *cobra.Command {
	cmd := &cobra.Command{
		Use:    "installer",
		Short:  "Run cri-proxy install on the node of this privileged pod",
		Hidden: true,
		Long: `Run cri-proxy install or uninstall on the node of this pod, label the node, and
stay until asked to stop, also where that went wrong: a new pod is another try.
The pod must be privileged and see the node's
processes (hostPID). See deploy/installer.`,
	}
	for action, short := range map[string]string{
		check: "Say what cri-proxy install would do", install: "Run cri-proxy install", uninstall: "Run cri-proxy uninstall",
	} {
		cmd.AddCommand(newAction(action, short))
	}
	cmd.AddCommand(&cobra.Command{
		Use: "done FILE", Short: "Succeed if the node is done", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			_, err := os.Stat(args[0])
			return err
		},
	})
	return cmd
}

func newAction(action, short string) *cobra.Command {
	i := &installer{action: action}
	cmd := &cobra.Command{
		Use: action, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			i.out = cmd.OutOrStdout()
			return i.run(ctx)
		},
	}
	f := cmd.Flags()
	f.StringVar(&i.host, "host", "/proc/1/root", "root of the node's files")
	f.StringVar(&i.node, "node", "", "name of the node, for its label (default: no label)")
	f.StringVar(&i.done, "done", "", "file to write when the node is done, for a readiness probe")
	f.StringVar(&i.args, "args", "", "more arguments of cri-proxy install or uninstall, separated by spaces")
	return cmd
}

type installer struct {
	action, host, node, done, args string
	dir                            string // of the binary, as the node sees it; empty if it is not there
	out                            io.Writer
}

func (i *installer) run(ctx context.Context) error {
	args := []string{i.action}
	if i.action == check {
		args = []string{install, "--dry-run"}
	}
	prefix, err := i.prefix()
	if err != nil {
		return err
	}
	i.dir = filepath.Join(string(prefix), hostDir)
	more := strings.Fields(i.args)
	if i.action == uninstall {
		var leftOver []string
		if more, leftOver = command.LeftOver(more); len(leftOver) > 0 {
			_, _ = fmt.Fprintf(i.out, "left out of ARGS, for they are of an install: %s\n", strings.Join(leftOver, " "))
		}
	}
	err = i.copyIn()
	switch {
	case err == nil:
		err = i.onHost(ctx, append(args, more...))
	case i.action == uninstall && errors.Is(err, unix.EROFS) && !i.installed(prefix):
		// Taken off by the pod before this one, and the prefix, which was another, has gone with it.
		_, _ = fmt.Fprintln(i.out, "cri-proxy is not installed here")
		i.dir, err = "", nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("copying this program to the node: %w; give a directory that can be written in ARGS, such as --prefix=/opt", err)
	default:
		return fmt.Errorf("copying this program to the node: %w", err)
	}
	if err != nil {
		if i.action != check {
			// A container that ends is started again, at once and without end where kubelet is restarted and forgets its back-off.
			_, _ = fmt.Fprintf(i.out, "%v\n%s went wrong; waiting to be stopped: a new pod tries again\n", err, i.action)
			<-ctx.Done()
		}
		return err
	}
	if err := i.setLabel(ctx); err != nil {
		return err
	}
	if i.action == uninstall && i.dir != "" {
		if err := os.RemoveAll(filepath.Join(i.host, i.dir)); err != nil {
			return err
		}
	}
	if i.done != "" {
		if err := os.WriteFile(i.done, nil, 0o644); err != nil {
			return err
		}
	}
	_, _ = fmt.Fprintf(i.out, "%s is done; waiting to be stopped\n", i.action)
	<-ctx.Done()
	return nil
}

// prefix is that of the arguments, which cri-proxy install gets too, or that of what is installed.
func (i *installer) prefix() (update.Prefix, error) {
	args := strings.Fields(i.args)
	for n, arg := range args {
		value, ok := strings.CutPrefix(arg, "--prefix=")
		if !ok && arg == "--prefix" && n+1 < len(args) {
			value, ok = args[n+1], true
		}
		if ok {
			p := update.Prefix(filepath.Clean(value))
			return p, p.Check()
		}
	}
	return update.ReadPrefix(filepath.Join(i.host, update.PrefixFile))
}

// installed says that something of an installation is on the node: an uninstall ends with these.
func (i *installer) installed(prefix update.Prefix) bool {
	return slices.ContainsFunc(command.Traces(prefix), func(path string) bool {
		_, err := os.Lstat(filepath.Join(i.host, path))
		return !errors.Is(err, fs.ErrNotExist)
	})
}

// copyIn puts this program on the node.
func (i *installer) copyIn() (err error) {
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer src.Close()
	dir := filepath.Join(i.host, i.dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dst, err := os.CreateTemp(dir, ".cri-proxy-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(dst.Name())
		}
	}()
	_, err = io.Copy(dst, src)
	if err = errors.Join(err, dst.Chmod(0o755), dst.Close()); err != nil {
		return err
	}
	return os.Rename(dst.Name(), filepath.Join(dir, "cri-proxy"))
}

// onHost has the node's systemd run it, and passes on what it says.
func (i *installer) onHost(ctx context.Context, args []string) error {
	run := append([]string{"--quiet", "--wait", "--collect", "--pipe", "--unit=" + unit, "--", filepath.Join(i.dir, "cri-proxy")}, args...)
	program, err := i.find("systemd-run")
	if err != nil {
		return err
	}
	if err := i.idle(ctx); err != nil {
		return err
	}
	// Not killed with this process: what systemd runs goes on anyway.
	cmd := exec.CommandContext(ctx, program, run...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: i.host}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = i.out, i.out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("cri-proxy %s on the node: %w", strings.Join(args, " "), err)
	}
	return nil
}

// idle waits until the node is done with what a pod before this one has begun.
func (i *installer) idle(ctx context.Context) error {
	program, err := i.find("systemctl")
	if err != nil {
		return err
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		cmd := exec.CommandContext(ctx, program, "is-active", unit)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: i.host}
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
		if _, err := os.Stat(filepath.Join(i.host, path)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s on the node: does it run systemd, and is the pod privileged, with hostPID?", name)
}

// setLabel says on the Node what there is.
func (i *installer) setLabel(ctx context.Context) error {
	if i.node == "" || i.action == check {
		return nil
	}
	c, err := apiserver.InCluster()
	if err != nil {
		return err
	}
	defer c.Close()
	var value any // null takes it away
	if i.action == install {
		value = "true"
	}
	patch := map[string]any{"metadata": map[string]any{
		"labels":      map[string]any{label: value},
		"annotations": map[string]any{"cri-proxy.io/installed-version": orNil(value, version.Short())},
	}}
	if err := c.Do(ctx, http.MethodPatch, "/api/v1/nodes/"+url.PathEscape(i.node), patch, &struct{}{}); err != nil {
		return fmt.Errorf("label of node %s: %w", i.node, err)
	}
	return nil
}

func orNil(there any, value string) any {
	if there == nil {
		return nil
	}
	return value
}
