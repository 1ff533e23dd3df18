// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package fakenode

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
)

// Processes gives the containers of a fakeRuntime real processes. Those behind a gate run the
// real hook, as runc does: its process is called runc:[2:INIT], runs the hook, and becomes the
// application with the same number.
type Processes struct {
	t    testing.TB
	init string // a shell under the name of runc's process

	// The rest is guarded by fakeRuntime.mu.
	CDI      int           // how many containers with CDI devices can be created
	Mortal   string        // a container whose application ends at once
	NoHook   bool          // the hook is not run, and the application begins at once
	DeadHook bool          // the container ends instead of running the hook
	SlowExec time.Duration // between the start, or the end of the hook, and the execution of the application
	LateHook bool          // the runtime's process does not come to run the hook
	// called in StopContainer, between the end of the process and that of the container
	Late     func(name string) error
	all      []*Process
	slots    map[string]*Process // of each slot, whose application began last
	Overlaps []string            // applications that began beside another of their slot
}

// Process is that of a container.
type Process struct {
	cmd    *exec.Cmd
	reaped chan struct{}
	pipe   *os.File
	heard  sync.WaitGroup

	// The rest is guarded by fakeRuntime.mu.
	stopping bool
	Handler  string // runtime type; empty: runc's
	Silent   bool   // the runtime tells nothing beyond CRI
}

// NewProcesses makes the runtime one of real processes, with CDI and the given directory for its
// specs.
func NewProcesses(t testing.TB, f *Runtime, dir string) {
	t.Helper()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	p := &Processes{t: t, init: filepath.Join(dir, "runc:[2:INIT]"), slots: map[string]*Process{}, CDI: 1000}
	if err := os.Symlink(shell, p.init); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]any{"enableCDI": true,
		"cdiSpecDirs": []string{"/etc/cdi", filepath.Join(dir, "cdi")}})
	if err != nil {
		t.Fatal(err)
	}
	f.Set(func(f *Runtime) { f.Processes, f.config = p, string(config) })
	t.Cleanup(func() {
		f.Mu.Lock()
		all := p.all
		for _, c := range f.Containers {
			if c.gate != nil {
				_ = c.gate.Close() // only read
			}
		}
		f.Mu.Unlock()
		for _, q := range all {
			q.kill()
			q.heard.Wait()
		}
	})
}

// Rename gives the runtime's processes another name.
func (p *Processes) Rename(dir, name string) {
	as := filepath.Join(dir, name)
	if as == p.init {
		return
	}
	if err := os.Rename(p.init, as); err != nil {
		p.t.Fatal(err)
	}
	p.init = as
}

// mount opens the directory that the hook comes from, for bind mounts outlive the names of what
// they mount.
func (p *Processes) mount(c *runtimeapi.ContainerConfig) (*os.File, error) {
	if len(c.GetCDIDevices()) == 0 {
		return nil, nil
	}
	if p == nil || p.CDI == 0 {
		return nil, status.Errorf(codes.Unknown,
			"failed to generate spec: CDI device injection failed: unresolvable CDI devices %v", c.GetCDIDevices())
	}
	p.CDI--
	plain := &runtimeapi.ContainerConfig{}
	gate.At("").Inject(plain)
	if c.GetCDIDevices()[0].GetName() != plain.GetCDIDevices()[0].GetName() {
		return nil, status.Error(codes.Unknown, "another device")
	}
	for _, m := range c.GetMounts() {
		if m.GetContainerPath() == plain.GetMounts()[0].GetContainerPath() {
			return os.Open(m.GetHostPath())
		}
	}
	return nil, status.Error(codes.Unknown, "no mount for the hook")
}

// run starts the container's process. The caller holds f.mu.
func (f *Runtime) run(c *Container) error {
	p := f.Processes
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	script, dir := `echo begun >&3; exec 3>&-; exec sleep 100000`, ""
	if NameOf(c.Status) == p.Mortal {
		script = `echo begun >&3; exit 3`
	}
	switch {
	case c.gate == nil || p.NoHook:
		if p.SlowExec > 0 {
			script = fmt.Sprintf(`sleep %f; `, p.SlowExec.Seconds()) + script
		}
	case p.LateHook:
		script = `sleep 100000; exit 1`
	case p.DeadHook:
		script = `exit 1`
	default:
		dir = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), c.gate.Fd())
		script = `"$0/hook" "$0/gate" || exit 1; ` + script
		if p.SlowExec > 0 {
			script = fmt.Sprintf(
				`"$0/hook" "$0/gate" || exit 1; sleep %f; echo begun >&3; exec 3>&-; exec sleep 100000`,
				p.SlowExec.Seconds())
		}
	}
	q := &Process{cmd: exec.Command(p.init, "-c", script, dir), reaped: make(chan struct{}), pipe: read}
	q.cmd.ExtraFiles = []*os.File{write}
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the hook ends with the container, as in a PID namespace
	err = errors.Join(q.cmd.Start(), write.Close())
	if err != nil {
		return errors.Join(err, read.Close())
	}
	c.Process = q
	p.all = append(p.all, q)
	name := NameOf(c.Status)
	q.heard.Go(func() { // ends with the process
		if line, _ := bufio.NewReader(read).ReadString('\n'); line != "" {
			f.begun(name, q)
		}
		_ = read.Close() // only read
	})
	q.heard.Go(func() { // ends with the process
		_ = q.cmd.Wait() // killed or not
		close(q.reaped)
		f.Mu.Lock()
		defer f.Mu.Unlock()
		if !q.stopping {
			f.End(c, int32(q.cmd.ProcessState.ExitCode()), "Error")
		}
	})
	return nil
}

// begun notes that an application has begun.
func (f *Runtime) begun(name string, q *Process) {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	p := f.Processes
	slot, _, _ := strings.Cut(name, "/")
	if before := p.slots[slot]; before != nil && before != q && before.alive() {
		p.Overlaps = append(p.Overlaps, name)
	}
	p.slots[slot] = q
}

// kill ends the process, and the hook that it runs, and waits for them.
func (q *Process) kill() {
	pid := q.cmd.Process.Pid
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)) // none of a process that is gone
	_ = syscall.Kill(-pid, syscall.SIGKILL)                                        // it may have ended
	<-q.reaped
	for _, child := range strings.Fields(string(children)) {
		for alive(child) {
			time.Sleep(time.Millisecond) //nolint:forbidigo // it has been killed, and is nobody's to wait for
		}
	}
}

func (q *Process) alive() bool { return alive(strconv.Itoa(q.cmd.Process.Pid)) }

// alive asks the kernel.
func alive(pid string) bool {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return false
	}
	state := b[bytes.LastIndexByte(b, ')')+2]
	return state != 'Z' && state != 'X'
}

func (q *Process) verbose(config *runtimeapi.ContainerConfig) map[string]string {
	if q.Silent {
		return nil
	}
	handler := q.Handler
	if handler == "" {
		handler = crinode.RuncType
	}
	b, err := json.Marshal(map[string]any{"config": config, "pid": q.cmd.Process.Pid, "runtimeType": handler})
	if err != nil {
		panic(err)
	}
	return map[string]string{"info": string(b)}
}

// Owned is what ofContainer is for processes of containers.
func (f *Runtime) Owned(pid int, container string) error {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	if c := f.Containers[container]; c != nil && c.Process != nil && c.Process.cmd.Process.Pid == pid {
		return nil
	}
	return fmt.Errorf("process %d is none of container %s", pid, container)
}

// Living returns the containers whose processes are alive, with what they do.
func (f *Runtime) Living() string {
	f.Mu.Lock()
	defer f.Mu.Unlock()
	var out []string
	for _, c := range f.Containers {
		if c.Process == nil || !c.Process.alive() {
			continue
		}
		name := NameOf(c.Status)
		if gate.Waiting(c.Process.cmd.Process.Pid) {
			name += " waits"
		}
		out = append(out, name)
	}
	return Joined(out)
}
