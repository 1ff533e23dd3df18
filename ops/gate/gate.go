// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// device is the CDI device that brings the hook.
	device = "cri-proxy.io/gate=wait"
	// specFile is the name of the CDI spec.
	specFile = "cri-proxy.json"
	// mountPoint is where the container has the gate. /dev is a tmpfs of the container's own, so
	// that nothing is left in its root file system, and it is there when that is read-only.
	mountPoint = "/dev/.cri-proxy"

	hookName = "hook"
	fifoName = "gate"

	// spec is a CDI spec with an OCI hook
	// (https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md).
	spec = `{"cdiVersion":"0.6.0","kind":"cri-proxy.io/gate","devices":[{"name":"wait","containerEdits":{"hooks":[` +
		`{"hookName":"startContainer","path":"` + mountPoint + `/` + hookName + `","args":["` + hookName + `","` +
		mountPoint + `/` + fifoName + `"]}]}}]}` + "\n"
)

// ErrNotHeld is returned when a container does not wait at its gate and never will.
var ErrNotHeld = errors.New("the container does not wait at its gate")

// Try makes dir, which gates are to be made in, and runs the hook there once. It finds out whether
// programs can be run from that file system.
func Try(ctx context.Context, dir string) error {
	if len(hook) == 0 {
		return fmt.Errorf("no hook for %s", runtime.GOARCH)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := try(ctx, At(filepath.Join(dir, "try"))); err != nil {
		return fmt.Errorf("the hook does not run in %s (is it mounted noexec?): %w", dir, err)
	}
	return nil
}

func try(ctx context.Context, gate *Gate) (err error) {
	if err := gate.Make(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gate.Remove()) }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(gate.dir, hookName), filepath.Join(gate.dir, fifoName))
	if err := cmd.Start(); err != nil {
		return err
	}
	held := gate.Await(ctx, func() error { return nil })
	if held == nil {
		held = gate.Open()
	} else {
		cancel() // kills it
	}
	return errors.Join(held, cmd.Wait())
}

// WriteSpec writes the CDI spec of the hook into dir, one of the directories that the runtime
// reads specs from, and makes that directory. It does nothing when the spec is there.
func WriteSpec(dir string) error {
	file := filepath.Join(dir, specFile)
	if b, err := os.ReadFile(file); err == nil && string(b) == spec {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// The runtime reads the directory at any time: never half a file under a name that it looks at.
	tmp := filepath.Join(dir, "."+specFile+".tmp")
	if err := os.WriteFile(tmp, []byte(spec), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// Gate is the gate of one container. It is not safe for concurrent use.
type Gate struct {
	dir  string
	fifo *os.File // the writing end, once the hook reads
}

// Dir is where the gates of a node are, each in a directory named after its container's token.
func Dir(stateDir string) string { return filepath.Join(stateDir, "gates") }

// At returns the gate whose files are in dir, a directory of its own. Nothing is made yet.
func At(dir string) *Gate { return &Gate{dir: dir} }

// Make makes the gate's files anew. They are open to every user: the hook runs as the
// container's.
func (g *Gate) Make() error {
	if err := os.MkdirAll(g.dir, 0o755); err != nil {
		return err
	}
	// A copy for each container, because a runtime with SELinux labels the files for it.
	program, fifo := filepath.Join(g.dir, hookName), filepath.Join(g.dir, fifoName)
	// The hook of a process before this one may be running there: it could not be written to, and
	// would take the byte.
	for _, old := range []string{program, fifo} {
		if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := writeProgram(program); err != nil {
		return err
	}
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		return &os.PathError{Op: "mkfifo", Path: fifo, Err: err}
	}
	// The umask may have taken bits away.
	return errors.Join(os.Chmod(g.dir, 0o755), os.Chmod(program, 0o755), os.Chmod(fifo, 0o666))
}

// writeProgram writes the hook while this process starts no other: that one would have the file
// open for writing until it runs its own program, and the kernel runs none that somebody writes to
// (ETXTBSY).
func writeProgram(path string) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, hook, 0o755)
}

// Fits says why a container cannot have a gate; nil if it can.
func Fits(c *runtimeapi.ContainerConfig) error {
	for _, m := range c.GetMounts() {
		if at := path.Clean(m.GetContainerPath()); at == "/dev" || at == mountPoint {
			return fmt.Errorf("it has a mount at %s", at)
		}
	}
	return nil
}

// Inject puts the gate before the container's entrypoint.
func (g *Gate) Inject(c *runtimeapi.ContainerConfig) {
	c.CDIDevices = append(c.CDIDevices, &runtimeapi.CDIDevice{Name: device})
	c.Mounts = append(c.Mounts, &runtimeapi.Mount{HostPath: g.dir, ContainerPath: mountPoint, Readonly: true,
		SelinuxRelabel: true})
}

// Strip takes a gate out of a config as Inject has put it in.
func Strip(c *runtimeapi.ContainerConfig) {
	c.CDIDevices = slices.DeleteFunc(c.CDIDevices, func(d *runtimeapi.CDIDevice) bool { return d.GetName() == device })
	c.Mounts = slices.DeleteFunc(c.Mounts, func(m *runtimeapi.Mount) bool { return m.GetContainerPath() == mountPoint })
}

// Await waits until the hook waits, asking failed from time to time whether that is still to be
// expected. It returns failed's error, or ctx's. From then on the hook notices when this process
// ends.
func (g *Gate) Await(ctx context.Context, failed func() error) error {
	wait := time.Millisecond
	for {
		held, err := g.hold()
		if held || err != nil {
			return err
		}
		if err := failed(); err != nil {
			// It may have come in the meantime.
			if held, _ := g.hold(); held {
				return nil
			}
			return err
		}
		select {
		case <-time.After(wait):
			wait = min(wait*3/2, 50*time.Millisecond)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hold takes the writing end if the hook reads.
func (g *Gate) hold() (bool, error) {
	if g.fifo != nil {
		return true, nil
	}
	name := filepath.Join(g.dir, fifoName)
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		g.fifo = os.NewFile(uintptr(fd), name)
		return true, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.EINTR): // no reader
		return false, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, ErrNotHeld // it has been opened
	default:
		return false, &os.PathError{Op: "open", Path: name, Err: err}
	}
}

// Open lets the application begin. The hook must wait: see [Gate.Await].
func (g *Gate) Open() error {
	if g.fifo == nil {
		return ErrNotHeld
	}
	_, err := g.fifo.Write([]byte("g"))
	return err
}

// Leave gives the writing end up: the hook goes on waiting, for the next process.
func (g *Gate) Leave() {
	if g.fifo != nil {
		_ = g.fifo.Close()
		g.fifo = nil
	}
}

// Remove removes the gate's files. A container that has passed keeps an empty
// directory as a mount.
func (g *Gate) Remove() error {
	g.Leave()
	return os.RemoveAll(g.dir)
}

// Exists reports whether the gate is there and has not been removed.
func (g *Gate) Exists() bool {
	_, err := os.Lstat(filepath.Join(g.dir, fifoName))
	return err == nil
}

// Waiting reports whether the runtime's process has not executed the entrypoint yet: until then it
// is called runc:[2:INIT] (runc, libcontainer/nsenter/nsexec.c) or crun. It is false for a process
// that is gone.
func Waiting(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return err == nil && (bytes.HasPrefix(b, []byte("runc:[")) || string(b) == "crun\n")
}

// Program is what a process executes, as the kernel tells it. Two are equal if nothing has been
// executed in between, unless that was the same file under the same name.
type Program struct {
	name        string
	device, ino uint64
}

// ProgramOf returns the program of a process.
//
// Errors: the process is gone, or none that this one may look at.
func ProgramOf(pid int) (Program, error) {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return Program{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &st); err != nil { // through the link, wherever the file is
		return Program{}, err
	}
	return Program{name: string(name), device: st.Dev, ino: st.Ino}, nil
}
