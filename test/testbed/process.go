// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pollInterval is how often a readiness condition is looked at; a bed has about ten of them, each a
// local call.
const pollInterval = 20 * time.Millisecond

// stopGrace is how long a component may take to end before it is killed.
const stopGrace = 10 * time.Second

// identity names a process beyond its pid, which the kernel reuses: never twice within the same
// clock tick of the same boot.
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of proc_pid_stat(5)
	Boot  string `json:"boot"`
	Exe   string `json:"exe"` // for people to read; a process may replace it
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// procStat returns the parent, the state and the start time of a process.
func procStat(pid int) (ppid int, state byte, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, 0, err
	}
	// The command name is in parentheses and may hold anything: fields start after the last one.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, 0, 0, fmt.Errorf("/proc/%d/stat is not in the known form", pid)
	}
	ppid, err = strconv.Atoi(f[1])
	if err != nil {
		return 0, 0, 0, err
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return ppid, f[0][0], start, err
}

func identify(pid int) (identity, error) {
	_, _, start, err := procStat(pid)
	if err != nil {
		return identity{}, err
	}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		return identity{}, err
	}
	return identity{PID: pid, Start: start, Boot: bootID(), Exe: exe}, nil
}

// alive is true while that very process runs; a zombie has ended.
func (id identity) alive() bool {
	if id.PID <= 1 || id.Boot != bootID() {
		return false
	}
	_, state, start, err := procStat(id.PID)
	return err == nil && start == id.Start && state != 'Z' && state != 'X'
}

// signal sends sig to that very process. It goes through a pidfd, so a pid reused in between is not
// hit.
func (id identity) signal(sig syscall.Signal) error {
	if !id.alive() {
		return unix.ESRCH
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !id.alive() {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// kill ends a process that need not be our child and returns once it is gone.
func (id identity) kill(ctx context.Context) error {
	if err := id.signal(unix.SIGKILL); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("kill process %d: %w", id.PID, err)
	}
	return poll(ctx, func() error {
		if id.alive() {
			return fmt.Errorf("process %d (%s) survives SIGKILL", id.PID, id.Exe)
		}
		return nil
	})
}

// poll calls cond until it returns nil or ctx is done, and returns its last error.
func poll(ctx context.Context, cond func() error) error {
	err := cond()
	if err == nil {
		return nil
	}
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		case <-tick.C:
		}
		if err = cond(); err == nil {
			return nil
		}
	}
}

// spawner forks every process of a bed on one OS thread that lives as long as the bed: the kernel
// sends the parent-death signal when the *thread* that forked ends (prctl(2)), not the process, and
// Go ends threads as it likes.
type spawner struct {
	calls chan func()
	done  chan struct{}
	// deathsig makes children die with this process, even on SIGKILL.
	deathsig bool
}

func newSpawner(deathsig bool) *spawner {
	s := &spawner{calls: make(chan func()), done: make(chan struct{}), deathsig: deathsig}
	go func() {
		defer close(s.done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for f := range s.calls {
			f()
		}
	}()
	return s
}

func (s *spawner) close() {
	close(s.calls)
	<-s.done
}

// command is what to run.
type command struct {
	name string // of the process within the bed, e.g. kubelet
	path string
	args []string
	env  []string // added to a minimal environment
	log  string   // file, appended to
	// netns is the file of the network namespace to run in; empty is this machine's.
	netns string
}

// newNamespace makes a network namespace and mounts it at file, which keeps it until it is
// unmounted.
func (s *spawner) newNamespace(file string) error {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	made := make(chan error, 1)
	s.calls <- func() {
		made <- atHome(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("new network namespace: %w", err)
			}
			return unix.Mount(ownNamespace, file, "", unix.MS_BIND, "")
		})
	}
	return <-made
}

// ownNamespace is the network namespace of the thread that reads it.
const ownNamespace = "/proc/thread-self/ns/net"

// inNamespace calls f with the thread in a network namespace. The caller has locked the thread.
func inNamespace(file string, f func() error) error {
	if file == "" {
		return f()
	}
	return atHome(func() error {
		if err := enter(file); err != nil {
			return err
		}
		return f()
	})
}

// atHome calls f, which takes the thread to another network namespace, and takes it back.
func atHome(f func() error) error {
	home, err := os.Open(ownNamespace)
	if err != nil {
		return err
	}
	defer home.Close()
	err = f()
	return errors.Join(err, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET))
}

func enter(file string) error {
	ns, err := os.Open(file)
	if err != nil {
		return err
	}
	defer ns.Close()
	return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
}

// Process is a running (or ended) component of a bed.
type Process struct {
	// Name within the bed, such as kubelet or, on the second node, n1-kubelet.
	Name string
	// PID is its process ID.
	PID int
	// LogFile takes its stdout and stderr.
	LogFile string

	process *os.Process
	done    chan struct{} // closed when it has been reaped
	err     error         // how it ended; read after done
}

// start runs c in a session of its own, so that a terminal's ctrl-C reaches only the owner, and
// records it in pidDir for the sweep.
func (s *spawner) start(c command, pidDir string) (*Process, error) {
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	defer log.Close()
	cmd := exec.Command(c.path, c.args...)
	cmd.Env = c.env
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.deathsig {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	started := make(chan error, 1)
	s.calls <- func() { started <- inNamespace(c.netns, cmd.Start) }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	p := &Process{Name: c.name, PID: cmd.Process.Pid, LogFile: c.log, process: cmd.Process, done: make(chan struct{})}
	err = recordProcess(p.PID, filepath.Join(pidDir, c.name+".json"))
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err != nil {
		_ = p.process.Kill()
		<-p.done
		return nil, fmt.Errorf("record %s: %w", c.name, err)
	}
	return p, nil
}

// recordProcess writes the identity of a child that has not been waited for: even one that ended at
// once still has its entry in /proc.
func recordProcess(pid int, file string) error {
	_, _, started, err := procStat(pid)
	if err != nil {
		return err
	}
	exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe") // a zombie has none
	b, err := json.Marshal(identity{PID: pid, Start: started, Boot: bootID(), Exe: exe})
	if err != nil {
		return err
	}
	return writeFileAtomic(file, b, 0o644)
}

// Running reports whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the process ended: nil for exit code 0, an [*exec.ExitError], or an error that says
// that it still runs.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return fmt.Errorf("%s (pid %d) still runs", p.Name, p.PID)
	}
}

// Signal sends sig to the process; the error wraps [os.ErrProcessDone] when it has ended.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.process.Signal(sig); err != nil {
		return fmt.Errorf("signal %s: %w", p.Name, err)
	}
	return nil
}

// stop sends sig, waits for the end, and kills after stopGrace.
func (p *Process) stop(ctx context.Context, sig syscall.Signal) error {
	if !p.Running() {
		return nil
	}
	if err := p.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop: %w", err)
	}
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-p.done:
		return nil
	case <-grace.C:
	case <-ctx.Done():
	}
	_ = p.Signal(syscall.SIGKILL)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopGrace):
		return fmt.Errorf("%s (pid %d) survives SIGKILL", p.Name, p.PID)
	}
}

// ready polls cond for at most readyTimeout and gives up early, quoting the log, when the process
// ends.
func (p *Process) ready(ctx context.Context, cond func(context.Context) error) error {
	ctx, expire := context.WithTimeout(ctx, readyTimeout)
	defer expire()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-p.done:
			cancel(errors.Join(errors.New("the process ended"), p.err))
		case <-stop:
		}
	}()
	if err := poll(ctx, func() error { return cond(ctx) }); err != nil {
		return fmt.Errorf("%s is not ready: %w; end of %s:\n%s", p.Name, err, p.LogFile, tail(p.LogFile, 2000))
	}
	return nil
}

// tail returns the last n bytes of a file, from the start of a line.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	if int64(len(b)) == n {
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return string(b)
}

// writeFileAtomic replaces path in one step.
func writeFileAtomic(path string, data []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
