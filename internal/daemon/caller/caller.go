// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package caller

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/ops/process"
	"github.com/cri-proxy/cri-proxy/proxy"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// Callers knows which processes have dialled the CRI socket, and finds kubelet among them. To look
// for a process by its name would not do: a container may take kubelet's name, and the environment
// that is read here becomes the one of plugins that run as root. A process that can dial this
// socket is root already.
type Callers struct {
	proc string
	log  logrus.FieldLogger

	mu    sync.Mutex // guards all following fields
	seen  map[process.Process]time.Time
	words string // the last problem, so that it is logged once
}

// maxCallers is how many processes Callers remembers before it forgets those that have ended.
const maxCallers = 64

// New returns Callers that has seen no process yet. proc is where procfs is mounted.
func New(proc string, log logrus.FieldLogger) *Callers {
	return &Callers{proc: proc, log: log, seen: map[process.Process]time.Time{}}
}

// Watch notes the connections of l.
func (c *Callers) Watch(l net.Listener) net.Listener { return noting{l, c} }

type noting struct {
	net.Listener
	callers *Callers
}

// Accept implements [net.Listener].
func (w noting) Accept() (net.Conn, error) {
	proxy.Unblock(w.Listener)
	conn, err := w.Listener.Accept()
	if err == nil {
		w.callers.note(conn)
	}
	return conn, err
}

// SetDeadline is for the CRI server, which stops accepting from time to time.
func (w noting) SetDeadline(t time.Time) error {
	l, ok := w.Listener.(interface{ SetDeadline(t time.Time) error })
	if !ok { // sockets have it
		return fmt.Errorf("%T: deadlines: %w", w.Listener, errors.ErrUnsupported)
	}
	return l.SetDeadline(t)
}

func (c *Callers) note(conn net.Conn) {
	p, err := process.Peer(c.proc, conn)
	if err != nil || p.PID == os.Getpid() {
		return // it has gone, or it is a probe of our own
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[p] = time.Now()
	if len(c.seen) > maxCallers {
		maps.DeleteFunc(c.seen, func(p process.Process, _ time.Time) bool { return p.Name(c.proc) == "" })
	}
}

// kubelet returns the kubelet that has dialled last, among those that run.
func (c *Callers) kubelet() (p process.Process, name string, ok bool) {
	c.mu.Lock()
	seen := maps.Clone(c.seen)
	c.mu.Unlock()
	latest := slices.SortedFunc(maps.Keys(seen), func(a, b process.Process) int { return seen[b].Compare(seen[a]) })
	for _, p := range latest {
		// Some distributions have kubelet in a program of their own: k3s-server, k3s-agent;
		// MicroK8s.
		name := p.Name(c.proc)
		if strings.HasPrefix(name, "kubelet") || strings.HasPrefix(name, "k3s") || name == "kubelite" {
			return p, name, true
		}
	}
	return process.Process{}, "", false
}

// Environ returns the environment that kubelet's credential provider plugins have: kubelet's
// (pkg/credentialprovider/plugin), or ours if that is not known.
func (c *Callers) Environ() []string {
	environ, why := c.lookUpEnviron()
	c.say(why)
	if why != "" {
		return os.Environ()
	}
	return environ
}

// KubeletsEnviron returns kubelet's environment. It is nil if that is not known, as at the start,
// before kubelet has called.
func (c *Callers) KubeletsEnviron() []string {
	environ, _ := c.lookUpEnviron()
	return environ
}

func (c *Callers) lookUpEnviron() (environ []string, unknown string) {
	p, _, ok := c.kubelet()
	if !ok {
		return nil, "kubelet has not called"
	}
	environ, err := p.Environ(c.proc)
	if err != nil {
		return nil, err.Error()
	}
	return environ, ""
}

func (c *Callers) say(why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if why != "" && why != c.words {
		c.log.WithField("reason", why).Warn("kubelet's environment is not known: " +
			"credential provider plugins run with cri-proxy's own")
	}
	c.words = why
}

// HighThreshold returns kubelet's imageGCHighThresholdPercent, or its default if that is not known.
func (c *Callers) HighThreshold() int {
	p, name, ok := c.kubelet()
	if !ok || !strings.HasPrefix(name, "kubelet") {
		return kubelet.DefaultImageGCHighThreshold
	}
	args, err := p.Args(c.proc)
	if err != nil || len(args) == 0 {
		return kubelet.DefaultImageGCHighThreshold
	}
	k := &kubelet.Kubelet{PID: p.PID, Args: args[1:]}
	k.Dir, _ = os.Readlink(filepath.Join(c.proc, strconv.Itoa(p.PID), "cwd")) // for relative paths only
	high, err := k.ImageGCHighThreshold()
	if err != nil {
		c.log.WithError(err).Debug("kubelet's imageGCHighThresholdPercent is not known")
		return kubelet.DefaultImageGCHighThreshold
	}
	return high
}
