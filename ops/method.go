// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

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

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/gate"
)

// Method is how a container hands over to its successor.
type Method = string

// The methods, the one with the shortest gap first. Overlap is for StartFirst only.
const (
	MethodGate    Method = "gate"    // the successor waits just before its entrypoint
	MethodPidfd   Method = "pidfd"   // the successor is started when the kernel tells the incumbent's end
	MethodPlain   Method = "plain"   // the successor is started when the runtime tells the incumbent's end
	MethodOverlap Method = "overlap" // the successor runs before the incumbent is stopped
	// MethodKubelet is for upgrades only: kubelet makes the successor, with the image that is there for it.
	MethodKubelet Method = "kubelet"
)

// methodsBest are those for StopFirst, best first.
var methodsBest = []Method{MethodGate, MethodPidfd, MethodPlain}

// probeAge is how long what was found out of the runtime counts: it may be
// reconfigured and restarted at any time.
const probeAge = time.Minute

// methods knows which methods this node has.
type methods struct {
	best       Method // the most that the configuration allows
	gatesDir   string
	cdiSpecDir string // empty: asked from the runtime
	// owned and watch are [ofContainer] and [watchExit], but for tests, whose processes have no cgroups of their own.
	owned func(pid int, container string) error
	watch func(pid int, container string) (*exitWatch, error)
	// cgroups is [cgroup.System.Find] of this machine, but for tests.
	cgroups func(pid int, container string) (*cgroup.Pod, error)
	// gatePatience is the constant of that name, but for tests on a machine with too much to do.
	gatePatience time.Duration

	probing sync.Mutex // held while the runtime is asked, and while gates that nobody knows are removed
	tried   bool       // the hook runs here; guarded by probing

	mu     sync.Mutex // guards all following fields
	probed time.Time
	noHook time.Time         // when the runtime was last seen not to run a hook
	why    map[Method]string // why a method is not available
}

func newMethods(best Method, stateDir, cdiSpecDir string) *methods {
	if best == "" {
		best = MethodGate
	}
	return &methods{
		best: best, gatesDir: gate.Dir(stateDir), cdiSpecDir: cdiSpecDir, owned: ofContainer, watch: watchExit,
		cgroups: cgroup.System{}.Find, gatePatience: gatePatience,
	}
}

// probe finds out which methods work, unless it has done so lately.
func (e *Engine) probe(ctx context.Context) {
	m := e.methods
	m.probing.Lock()
	defer m.probing.Unlock()
	if m.fresh() {
		return
	}
	why, again := map[Method]string{}, false
	for _, method := range methodsBest {
		if slices.Index(methodsBest, method) < slices.Index(methodsBest, m.best) {
			why[method] = "restart.method is " + string(m.best)
		}
	}
	if why[MethodPidfd] == "" {
		if fd, err := unix.PidfdOpen(os.Getpid(), 0); err != nil {
			why[MethodPidfd] = fmt.Sprintf("pidfd_open: %v", err)
		} else {
			_ = unix.Close(fd)
		}
	}
	if why[MethodGate] == "" {
		if err := e.probeGate(ctx); err != nil {
			why[MethodGate] = err.Error()
			again = status.Code(err) == codes.Unavailable || ctx.Err() != nil
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if again { // not to be believed: asked again next time
		m.probed, m.why = time.Time{}, why
		return
	}
	for _, method := range methodsBest {
		if was, is := m.why[method], why[method]; was != is || m.probed.IsZero() {
			e.log.WithField("method", method).WithField("reason", is).Infof("restart method available: %v", is == "")
		}
	}
	m.probed, m.why = time.Now(), why
}

// fresh reports whether what was found out still counts.
func (m *methods) fresh() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.probed.IsZero() && time.Since(m.probed) < probeAge
}

// probeGate makes everything ready for gates. The caller holds methods.probing.
func (e *Engine) probeGate(ctx context.Context) error {
	m := e.methods
	if err := m.trusted(); err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st, err := e.rt.Status(call, &runtimeapi.StatusRequest{Verbose: true})
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
	switch {
	case config.EnableCDI != nil && !*config.EnableCDI:
		return errors.New("CDI is off in the runtime: set enable_cdi in containerd's CRI configuration")
	case len(config.CDISpecDirs) == 0:
		return errors.New("the runtime reads no CDI specs: set cdi_spec_dirs in containerd's CRI configuration")
	case m.cdiSpecDir != "" && !slices.ContainsFunc(config.CDISpecDirs, func(d string) bool { return filepath.Clean(d) == filepath.Clean(m.cdiSpecDir) }):
		return fmt.Errorf("the runtime does not read CDI specs from restart.cdiSpecDir %s but from %v", m.cdiSpecDir, config.CDISpecDirs)
	}
	if !m.tried {
		if err := gate.Try(ctx, m.gatesDir); err != nil {
			return err
		}
		m.tried = true
	}
	dir := m.cdiSpecDir
	if dir == "" {
		dir = config.CDISpecDirs[len(config.CDISpecDirs)-1] // dynamic ones by convention: /etc/cdi, /var/run/cdi
	}
	if err := gate.WriteSpec(dir); err != nil {
		return fmt.Errorf("CDI spec: %w", err)
	}
	return nil
}

// available reports whether the node has the method.
func (m *methods) available(method Method) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.why != nil && m.why[method] == ""
}

// maybe is available, but for the time before the first answer of the runtime, when it counts what may be used.
func (m *methods) maybe(method Method) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.why == nil {
		return slices.Index(methodsBest, method) >= slices.Index(methodsBest, m.best)
	}
	return m.why[method] == ""
}

// noHookAge is how long a runtime that has not run a hook is not trusted with another one.
const noHookAge = time.Hour

// hookNotRun notes that the runtime has started a container without running its hook.
func (m *methods) hookNotRun(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.noHook = now
	if m.why != nil && m.why[MethodGate] == "" {
		m.why[MethodGate] = errHookNotRun.Error()
	}
}

// trusted is nil if the runtime is expected to run hooks.
func (m *methods) trusted() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.noHook.IsZero() && time.Since(m.noHook) < noHookAge {
		return errHookNotRun
	}
	return nil
}

var errHookNotRun = fmt.Errorf("the runtime has started a container without running its hook, and is not trusted with another for %s", noHookAge)

// gate returns the gate with that token, which need not exist.
func (m *methods) gate(token string) *gate.Gate {
	if token == "" {
		token = "none" // never the directory of all
	}
	return gate.At(filepath.Join(m.gatesDir, token))
}

// removeStray removes the gates whose token nobody knows.
func (m *methods) removeStray(known func(token string) bool) error {
	m.probing.Lock() // what it tries is in there too
	defer m.probing.Unlock()
	entries, err := os.ReadDir(m.gatesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, entry := range entries {
		if !known(entry.Name()) {
			err = errors.Join(err, m.gate(entry.Name()).Remove())
		}
	}
	return err
}

// list describes the methods for a person.
func (m *methods) list() []*opsv1.RestartMethod {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*opsv1.RestartMethod
	for _, method := range methodsBest {
		reason := m.why[method]
		if m.why == nil {
			reason = "the runtime has not answered yet"
		}
		out = append(out, &opsv1.RestartMethod{Name: string(method), Available: reason == "", Reason: reason})
	}
	return out
}

// runcType is containerd's runtime type for runc and what takes its place (crun, nvidia-container-runtime). Others, such as
// gVisor and Kata, have no hooks inside the container.
const runcType = "io.containerd.runc.v2"

// containerInfo is what containerd tells in a verbose status (internal/cri/server/container_status.go).
type containerInfo struct {
	PID         int    `json:"pid"`
	RuntimeType string `json:"runtimeType"`
}

// inspect returns the container's status and what the runtime tells beyond CRI; zero if it does not.
func (e *Engine) inspect(ctx context.Context, id string) (*runtimeapi.ContainerStatus, containerInfo, error) {
	var info containerInfo
	st, err := e.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, info, err
	}
	if raw := st.GetInfo()["info"]; raw != "" {
		if err := json.Unmarshal([]byte(raw), &info); err != nil {
			e.log.WithField("container", id).WithError(err).Warn("verbose status not understood")
		}
	}
	return st.GetStatus(), info, nil
}
