// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package switchover knows by which methods this node can switch from a container to its successor,
// and waits for what a switch depends on: the exit of a process, a process at its gate.
package switchover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
)

// methods are those for StopFirst, the one with the shortest gap first.
var methods = []string{opsv1.MethodGate, opsv1.MethodPidfd, opsv1.MethodPlain}

const (
	// gateTimeout bounds the wait for a started container to come to its gate. It takes
	// milliseconds. If it takes this long, the method without a gate is better.
	gateTimeout = 10 * time.Second
	// HookTimeout is how long a process may take to come to its hook or entrypoint, and how far the
	// runtime's state may lag behind the kernel's.
	HookTimeout = time.Second
	// ProbeAge is how long the answers of a probe count: the runtime may be reconfigured and
	// restarted at any time.
	ProbeAge = time.Minute
	// NoHookAge is how long a runtime that did not run a hook is not trusted with another one.
	NoHookAge = time.Hour
)

// Options configures a [Prober]. StateDir, Runtime and Log are required.
type Options struct {
	// StateDir is the directory with the directory of the gates.
	StateDir string
	Runtime  runtimeapi.RuntimeServiceClient
	Log      logrus.FieldLogger
	// Best is the fastest method that may be used for StopFirst. Empty means [opsv1.MethodGate].
	Best string
	// CDISpecDir is one of the directories from which the runtime reads CDI specs. If it is empty,
	// the prober asks the runtime.
	CDISpecDir string
}

// Machine is what a [Prober] asks the machine. Tests, whose processes have no cgroups of their own,
// replace parts of it before the first use.
type Machine struct {
	// OfContainer is [OfContainer].
	OfContainer func(pid int, container string) error
	// Watch is [Watch].
	Watch func(pid int, container string) (*Exit, error)
	// FindPod is [cgroup.System.Find] of this machine.
	FindPod func(pid int, container string) (*cgroup.Pod, error)
	// Now is [time.Now].
	Now func() time.Time
	// GateTimeout bounds the wait for a started container to come to its gate.
	GateTimeout time.Duration
}

// Prober knows which methods this node has.
type Prober struct {
	Machine

	runtime    runtimeapi.RuntimeServiceClient
	log        logrus.FieldLogger
	best       string
	gatesDir   string
	gatesLost  bool
	cdiSpecDir string // empty: ask the runtime

	probing sync.Mutex // held during a probe, and while unknown gates are removed
	tried   bool       // the hook runs here; guarded by probing

	mu     sync.Mutex // guards all following fields
	probed time.Time
	noHook time.Time         // when the runtime last did not run a hook
	why    map[string]string // why a method is not available
}

// NewProber returns a Prober that has not asked the runtime yet.
func NewProber(o Options) *Prober {
	p := &Prober{
		Machine: Machine{
			OfContainer: OfContainer, Watch: Watch, FindPod: cgroup.System{}.Find, Now: time.Now,
			GateTimeout: gateTimeout,
		},
		runtime: o.Runtime, log: o.Log, best: o.Best, gatesDir: gate.Dir(o.StateDir), cdiSpecDir: o.CDISpecDir,
	}
	if p.best == "" {
		p.best = opsv1.MethodGate
	}
	_, err := os.Lstat(p.gatesDir)
	p.gatesLost = errors.Is(err, fs.ErrNotExist)
	return p
}

// Probe finds out which methods work, unless it did so within [ProbeAge].
func (p *Prober) Probe(ctx context.Context) {
	p.probing.Lock()
	defer p.probing.Unlock()
	if p.isFresh() {
		return
	}
	why, again := map[string]string{}, false
	for _, method := range methods {
		if slices.Index(methods, method) < slices.Index(methods, p.best) {
			why[method] = "restart.method is " + p.best
		}
	}
	if why[opsv1.MethodPidfd] == "" {
		if fd, err := unix.PidfdOpen(os.Getpid(), 0); err != nil {
			why[opsv1.MethodPidfd] = fmt.Sprintf("pidfd_open: %v", err)
		} else {
			_ = unix.Close(fd)
		}
	}
	if why[opsv1.MethodGate] == "" {
		if err := p.probeGate(ctx); err != nil {
			why[opsv1.MethodGate] = err.Error()
			again = status.Code(err) == codes.Unavailable || ctx.Err() != nil
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if again { // the answer does not count: the next Probe asks again
		p.probed, p.why = time.Time{}, why
		return
	}
	for _, method := range methods {
		if was, is := p.why[method], why[method]; was != is || p.probed.IsZero() {
			log := p.log.WithField("method", method).WithField("reason", is)
			log.Infof("restart method available: %v", is == "")
		}
	}
	p.probed, p.why = p.Now(), why
}

// isFresh reports whether the answers of the last probe still count.
func (p *Prober) isFresh() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.probed.IsZero() && p.Now().Sub(p.probed) < ProbeAge
}

// probeGate makes everything ready for gates. The caller holds probing.
func (p *Prober) probeGate(ctx context.Context) error {
	if err := p.runsHooks(); err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st, err := p.runtime.Status(call, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return err
	}
	// containerd's configuration of its CRI plugin (internal/cri/config/config.go).
	var config struct {
		EnableCDI   *bool    `json:"enableCDI"` // gone in 2.1, where it is always on
		CDISpecDirs []string `json:"cdiSpecDirs"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["config"]), &config); err != nil {
		return errors.New("the runtime does not tell its configuration")
	}
	isOurs := func(dir string) bool { return filepath.Clean(dir) == filepath.Clean(p.cdiSpecDir) }
	switch {
	case config.EnableCDI != nil && !*config.EnableCDI:
		return errors.New("CDI is off in the runtime: set enable_cdi in containerd's CRI configuration")
	case len(config.CDISpecDirs) == 0:
		return errors.New("the runtime reads no CDI specs: set cdi_spec_dirs in containerd's CRI configuration")
	case p.cdiSpecDir != "" && !slices.ContainsFunc(config.CDISpecDirs, isOurs):
		return fmt.Errorf("the runtime does not read CDI specs from restart.cdiSpecDir %s but from %v",
			p.cdiSpecDir, config.CDISpecDirs)
	}
	if !p.tried {
		if err := gate.Try(ctx, p.gatesDir); err != nil {
			return err
		}
		p.tried = true
	}
	dir := p.cdiSpecDir
	if dir == "" {
		// By convention the last one is for dynamic specs: /etc/cdi, /var/run/cdi.
		dir = config.CDISpecDirs[len(config.CDISpecDirs)-1]
	}
	if err := gate.WriteSpec(dir); err != nil {
		return fmt.Errorf("CDI spec: %w", err)
	}
	return nil
}

// Available reports whether the node has the method.
func (p *Prober) Available(method string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why != nil && p.why[method] == ""
}

// Maybe is like Available, but before the first answer of the runtime it reports what the
// configuration allows.
func (p *Prober) Maybe(method string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why == nil {
		return slices.Index(methods, method) >= slices.Index(methods, p.best)
	}
	return p.why[method] == ""
}

// List describes the methods for a person.
func (p *Prober) List() []*opsv1.RestartMethod {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*opsv1.RestartMethod
	for _, method := range methods {
		reason := p.why[method]
		if p.why == nil {
			reason = "the runtime has not answered yet"
		}
		out = append(out, &opsv1.RestartMethod{Name: method, Available: reason == "", Reason: reason})
	}
	return out
}

var errHookNotRun = fmt.Errorf("the runtime has started a container without running its hook, "+
	"and is not trusted with another for %s", NoHookAge)

// HookNotRun notes that the runtime has started a container without running its hook.
func (p *Prober) HookNotRun() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noHook = p.Now()
	if p.why != nil && p.why[opsv1.MethodGate] == "" {
		p.why[opsv1.MethodGate] = errHookNotRun.Error()
	}
}

// runsHooks returns nil if the runtime is expected to run hooks.
func (p *Prober) runsHooks() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.noHook.IsZero() && p.Now().Sub(p.noHook) < NoHookAge {
		return errHookNotRun
	}
	return nil
}

// Gate returns the gate with that token, which need not exist.
func (p *Prober) Gate(token string) *gate.Gate {
	if token == "" {
		token = "none" // never the directory of all gates
	}
	return gate.At(filepath.Join(p.gatesDir, token))
}

// GatesLost reports whether even the directory of the gates was missing when the prober was made.
func (p *Prober) GatesLost() bool { return p.gatesLost }

// RemoveStray removes the gates whose token is not known.
func (p *Prober) RemoveStray(known func(token string) bool) error {
	p.probing.Lock() // a probe has a gate of its own there
	defer p.probing.Unlock()
	entries, err := os.ReadDir(p.gatesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, entry := range entries {
		if !known(entry.Name()) {
			err = errors.Join(err, p.Gate(entry.Name()).Remove())
		}
	}
	return err
}

// Waits reports whether the container's process has not come to its entrypoint.
func (p *Prober) Waits(pid int, container string) bool {
	return pid > 0 && p.OfContainer(pid, container) == nil && gate.Waiting(pid)
}

// StillWaits is like [Prober.Waits] for a container that may have no gate and be about to come to
// its entrypoint, which takes as long as the runtime needs to execute it. If ctx ends before that
// is known, the container is taken to wait.
func (p *Prober) StillWaits(ctx context.Context, pid int, container string) bool {
	for until := time.Now().Add(HookTimeout); p.Waits(pid, container); {
		if time.Now().After(until) {
			return true
		}
		if crinode.Sleep(ctx, 10*time.Millisecond) != nil {
			return true
		}
	}
	return false
}
