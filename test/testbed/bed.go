// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Bed is a running test bed. Its methods may be called by several goroutines. The embedded Node is
// the first of Nodes.
type Bed struct {
	*Node
	// ID is short and unique on this machine.
	ID   string
	Mode Mode
	// Dir holds everything of this bed that is not a socket; Logs is below it.
	Dir, Logs string
	// Bin holds all programs of this bed.
	Bin string
	// Nodes has one or more elements.
	Nodes []*Node
	// Registry is host:port of the image registry, plain HTTP. See [Bed.Image].
	Registry string
	// PKI is the bed's certificates.
	PKI *PKI
	// APIServer is its URL and Kubeconfig the administrator's; empty in Node mode.
	APIServer, Kubeconfig string
	// ControllerKubeconfig is what StartController uses: the administrator's unless a test sets one
	// of [Bed.NewKubeconfig].
	ControllerKubeconfig string
	// ControllerMetricsAddress and ControllerHealthAddress are cri-controller's, host:port.
	ControllerMetricsAddress, ControllerHealthAddress string

	options                               Options
	source                                string
	ledger                                ledger
	record                                record
	release                               func()
	spawner                               *spawner
	began                                 time.Time
	plain, api                            *http.Client
	etcdPort, etcdPeerPort, apiserverPort int
	opsPort                               int

	mu        sync.Mutex
	processes map[string]*Process // guarded by mu
	closed    bool                // guarded by mu
}

// Start builds what is missing, sweeps what dead runs left, and brings a bed up. When it returns
// without error a Node bed answers CRI calls and a Cluster bed runs pods. On error nothing is left
// behind. ctx bounds the start only.
func Start(ctx context.Context, o Options) (*Bed, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a test bed runs containers, so it needs root: run it with sudo")
	}
	source, err := SourceDir(o.Source)
	if err != nil {
		return nil, err
	}
	components, err := Build(ctx, source, o.Mode, o.Log)
	if err != nil {
		return nil, err
	}
	images, err := seed(ctx, source, components, o.Log)
	if err != nil {
		return nil, err
	}
	if o.Containerd17 {
		older, err := buildContainerd17(ctx, source, o.Log)
		if err != nil {
			return nil, err
		}
		maps.Copy(older, o.ComponentBin) // what the caller asks for by name comes first
		o.ComponentBin = older
	}
	b, err := allocate(ctx, o, source)
	if err != nil {
		return nil, err
	}
	if err := b.up(ctx, components, images); err != nil {
		closeCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
		defer cancel()
		return nil, fmt.Errorf("start bed %s: %w", b.ID, errors.Join(err, b.close(closeCtx, true)))
	}
	return b, nil
}

// allocate reserves the bed's names and networks and computes everything that follows from them.
func allocate(ctx context.Context, o Options, source string) (*Bed, error) {
	b := &Bed{Mode: o.Mode, options: o, source: source, ledger: ledger{root: runRoot}, began: time.Now(),
		processes: map[string]*Process{}}
	b.plain = oneShotClient()
	dir := o.Dir
	if dir == "" {
		cache, err := CacheDir()
		if err != nil {
			return nil, err
		}
		dir = filepath.Join(cache, "runs")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	b.record, b.release, err = b.ledger.allocate(ctx, o.Nodes, o.Log, func(r *record) {
		r.Mode = o.Mode.String()
		// Also below a directory that the caller chose: removing that one itself would take what
		// else is in it.
		r.Dir = filepath.Join(dir, r.ID)
		for i := range r.Nodes {
			n := &r.Nodes[i]
			n.Name = fmt.Sprintf("node-%s-%d", r.ID, i)
			n.Bridge = fmt.Sprintf("cpt-%s-%d", r.ID, i)
			n.Network = fmt.Sprintf("cri-proxy-test-%s-%d", r.ID, i)
			n.CRI = filepath.Join(b.ledger.runDir(r.ID), fmt.Sprintf("n%d", i), "cri-proxy.sock")
			if o.Direct {
				n.CRI = filepath.Join(filepath.Dir(n.CRI), "containerd.sock")
			}
		}
	})
	if err != nil {
		return nil, err
	}
	b.ID, b.Dir = b.record.ID, b.record.Dir
	b.Logs, b.Bin = filepath.Join(b.Dir, "log"), filepath.Join(b.Dir, "bin")
	for i, r := range b.record.Nodes {
		name := fmt.Sprintf("n%d", i)
		network, gateway := subnet(r.Subnet)
		n := &Node{
			NodeName: r.Name, NodeDir: filepath.Join(b.Dir, name), RunDir: filepath.Join(b.ledger.runDir(b.ID), name),
			Bridge: r.Bridge, BridgeIP: gateway.String(), PodCIDR: network.String(), CRISocket: r.CRI,
			CgroupParent: cgroupPath(b.ID) + "/" + name, bed: b, network: r.Network, subnet: network,
		}
		n.RuntimeSocket, n.ProxySocket = filepath.Join(n.RunDir, "containerd.sock"),
			filepath.Join(n.RunDir, "cri-proxy.sock")
		n.AdminSocket, n.StateDir = filepath.Join(n.RunDir, "admin.sock"), filepath.Join(n.NodeDir, "state")
		n.PodLogs = filepath.Join(n.NodeDir, "pods")
		if i > 0 {
			n.prefix = name + "-"
			if o.Namespaces {
				n.netns = filepath.Join(n.RunDir, "netns")
			}
		}
		b.Nodes = append(b.Nodes, n)
	}
	b.Node = b.Nodes[0]
	b.spawner = newSpawner(!o.Detach)
	return b, nil
}

func (b *Bed) up(ctx context.Context, components, images string) error {
	for _, d := range []string{b.Dir, b.Logs, b.Bin, filepath.Join(b.Dir, "etc"), b.pidDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := b.linkPrograms(components); err != nil {
		return err
	}
	// The copy is small (some 20 MB) and makes pushes of tests the bed's own.
	if err := os.CopyFS(b.storage(), os.DirFS(images)); err != nil {
		return err
	}
	var err error
	if b.PKI, err = newPKI(filepath.Join(b.Dir, "pki")); err != nil {
		return err
	}
	if !b.options.Direct {
		if err := b.product(ctx, "cri-proxy", b.options.ProxyBinary); err != nil {
			return err
		}
	}
	// From here on: the compiler takes minutes the first time.
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, fmt.Errorf("the bed is not up within %s", readyTimeout))
	defer cancel()
	if err := b.assignAddresses(ctx); err != nil {
		return err
	}
	b.step("bed %s prepared in %s", b.ID, b.Dir)

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.StartRegistry(gctx) })
	for _, n := range b.atOnce() {
		g.Go(func() error { return n.startRuntime(gctx) })
	}
	if b.Mode == ModeCluster {
		g.Go(func() error { return b.startControlPlane(gctx) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	b.step("container runtime ready at %s", b.CRISocket)
	if b.Mode == ModeCluster {
		g, gctx := errgroup.WithContext(ctx)
		for _, n := range b.atOnce() {
			g.Go(func() error { return n.StartKubelet(gctx) })
		}
		if err := g.Wait(); err != nil {
			return err
		}
		if err := b.waitCluster(ctx); err != nil {
			return err
		}
		b.step("cluster ready, %d node(s)", len(b.atOnce()))
	}
	if b.options.Detach {
		b.record.Detached, b.record.Kubeconfig = true, b.Kubeconfig
		return b.ledger.write(b.record)
	}
	return nil
}

// atOnce returns the nodes that start with the bed.
func (b *Bed) atOnce() []*Node { return b.Nodes[:len(b.Nodes)-b.options.Later] }

// assignAddresses picks ports and prepares the nodes: bridges must be up before their addresses can
// be bound.
func (b *Bed) assignAddresses(ctx context.Context) error {
	for i, n := range b.Nodes {
		if i == 0 {
			// Nodes refer to the registry in their configuration, so its address is settled with
			// the first bridge.
			b.Registry = net.JoinHostPort(n.BridgeIP, fmt.Sprint(registryPort))
		}
		b.opsPort = opsPort
		n.OpsAddress = net.JoinHostPort(n.BridgeIP, fmt.Sprint(b.opsPort))
		n.MetricsAddress = net.JoinHostPort(n.BridgeIP, fmt.Sprint(proxyMetricsPort))
		if err := n.prepare(ctx); err != nil {
			return err
		}
	}
	if b.Mode != ModeCluster {
		return nil
	}
	var err error
	pick := func(want int) (port int) {
		if err == nil {
			port, err = freePort(b.BridgeIP, want)
		}
		return port
	}
	b.etcdPort, b.etcdPeerPort, b.apiserverPort = pick(etcdPort), pick(etcdPort+1), pick(apiserverPort)
	b.ControllerMetricsAddress = net.JoinHostPort(b.BridgeIP, fmt.Sprint(pick(8080)))
	b.ControllerHealthAddress = net.JoinHostPort(b.BridgeIP, fmt.Sprint(pick(8081)))
	if err != nil {
		return err
	}
	b.APIServer = fmt.Sprintf("https://%s", net.JoinHostPort(b.BridgeIP, fmt.Sprint(b.apiserverPort)))
	admin, err := b.PKI.cluster.issue(b.PKI.Dir, "admin", subject{name: "admin", groups: []string{"system:masters"}})
	if err != nil {
		return err
	}
	if b.Kubeconfig, err = b.writeKubeconfig("admin", admin); err != nil {
		return err
	}
	b.ControllerKubeconfig = b.Kubeconfig
	b.api, err = b.apiClient(admin)
	return err
}

// linkPrograms fills Bin with the components, or what Options.ComponentBin has in their place.
func (b *Bed) linkPrograms(components string) error {
	entries, err := os.ReadDir(components)
	if err != nil {
		return err
	}
	links := map[string]string{}
	for _, e := range entries {
		links[e.Name()] = filepath.Join(components, e.Name())
	}
	for name, path := range b.options.ComponentBin {
		if links[name] == "" {
			return fmt.Errorf("option ComponentBin: there is no component %q", name)
		}
		if links[name], err = filepath.Abs(path); err != nil {
			return err
		}
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(b.Bin, name)); err != nil {
			return err
		}
	}
	return nil
}

// product puts one of the project's programs into Bin unless it is there.
func (b *Bed) product(ctx context.Context, name, given string) error {
	dst := filepath.Join(b.Bin, name)
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, err := os.Stat(dst); err == nil {
		return nil
	}
	if given != "" {
		return copyFile(given, dst)
	}
	var flags []string
	if b.options.Race {
		flags = []string{"-race"}
	}
	return buildProduct(ctx, b.source, name, dst, flags...)
}

func (b *Bed) pidDir() string { return filepath.Join(b.ledger.runDir(b.ID), "pid") }

// start runs one of Bin's programs under a name that is unique in the bed. A process of that name
// that ended is replaced.
func (b *Bed) start(name, program string, args ...string) (*Process, error) {
	return b.startIn("", nil, name, program, args...)
}

// startIn is start in a network namespace, which is a file; empty is this machine's. more is added
// to the environment.
func (b *Bed) startIn(netns string, more []string, name, program string, args ...string) (*Process, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("start %s: the bed is closed", name)
	}
	if p := b.processes[name]; p != nil && p.Running() {
		return nil, fmt.Errorf("start %s: it runs already with pid %d", name, p.PID)
	}
	env := append([]string{
		"PATH=" + b.Bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + b.Dir,
		"LANG=C.UTF-8",
	}, more...)
	p, err := b.spawner.start(command{name: name, path: filepath.Join(b.Bin, program), args: args, env: env,
		log: b.logFile(name), netns: netns}, b.pidDir())
	if err == nil {
		b.processes[name] = p
	}
	return p, err
}

func (b *Bed) process(name string) *Process {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.processes[name]
}

func (b *Bed) stop(ctx context.Context, name string, sig syscall.Signal) error {
	p := b.process(name)
	if p == nil {
		return fmt.Errorf("stop %s: it has not been started", name)
	}
	return p.stop(ctx, sig)
}

// Process returns a component by name: registry, containerd, cri-proxy, kubelet, etcd,
// kube-apiserver, kube-controller-manager, kube-scheduler or cri-controller; those of further nodes
// begin with n1-, n2-. It is nil when it was never started.
func (b *Bed) Process(name string) *Process { return b.process(name) }

// Pid returns the process ID of a running component, 0 when it does not run. Names are those of
// [Bed.Process].
func (b *Bed) Pid(name string) int {
	if p := b.process(name); p != nil && p.Running() {
		return p.PID
	}
	return 0
}

// LogFile returns where a component logs. Restarts append.
func (b *Bed) LogFile(name string) string { return b.logFile(name) }

func (b *Bed) logFile(name string) string { return filepath.Join(b.Logs, name+".log") }

// step tells a person what has been done and when.
func (b *Bed) step(format string, args ...any) {
	fmt.Fprintf(b.options.Log, "%6.2fs  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

// Close stops everything and removes every trace of the bed. Pods are removed by containerd where
// it still can; the rest by force. It returns an error, and keeps the logs, when a program built
// with Options.Race reported a data race. Calling it again is harmless.
func (b *Bed) Close(ctx context.Context) error {
	return b.close(ctx, b.options.KeepLogs != nil && b.options.KeepLogs())
}

func (b *Bed) close(ctx context.Context, keepLogs bool) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	var first []*Process // all but containerd and the registry: their state is thrown away, so they need no grace
	for name, p := range b.processes {
		if name != "registry" && !strings.HasSuffix(name, "containerd") {
			first = append(first, p)
		}
	}
	b.mu.Unlock()
	began := time.Now()
	var errs []error
	for _, p := range first {
		_ = p.Signal(unix.SIGKILL)
	}
	for _, p := range first {
		errs = append(errs, p.stop(ctx, unix.SIGKILL))
	}
	var wg sync.WaitGroup
	for _, n := range b.Nodes {
		p := b.process(n.name("containerd"))
		if p == nil || !p.Running() {
			continue
		}
		wg.Go(func() {
			if err := removePods(ctx, n.RuntimeSocket); err != nil {
				b.step("remove pods of %s, which now go by force: %v", n.NodeName, err)
			}
			_ = p.stop(ctx, unix.SIGTERM)
		})
	}
	wg.Wait()
	b.spawnerClose(ctx, &errs)
	races := b.races()
	if keepLogs || races != nil {
		errs = append(errs, b.keepLogs())
	}
	if err := errors.Join(errs...); err != nil {
		b.step("close: %v", err)
	}
	err := b.ledger.destroy(ctx, b.record)
	b.release()
	b.step("bed %s removed in %.1fs", b.ID, time.Since(began).Seconds())
	return errors.Join(races, err)
}

// races returns an error when one of the project's programs, built with Options.Race, reported a
// data race in its log.
func (b *Bed) races() error {
	var errs []error
	logs, _ := filepath.Glob(filepath.Join(b.Logs, "*.log"))
	for _, log := range logs {
		out, err := os.ReadFile(log)
		if err != nil || !strings.Contains(filepath.Base(log), "cri-") {
			continue
		}
		if _, report, found := strings.Cut(string(out), "WARNING: DATA RACE"); found {
			errs = append(errs,
				fmt.Errorf("%s reports a data race:%s", filepath.Base(log), report[:min(len(report), 3000)]))
		}
	}
	return errors.Join(errs...)
}

// spawnerClose ends what is left, then the thread whose end would kill it.
func (b *Bed) spawnerClose(ctx context.Context, errs *[]error) {
	b.mu.Lock()
	rest := make([]*Process, 0, len(b.processes))
	for _, p := range b.processes {
		rest = append(rest, p)
	}
	b.mu.Unlock()
	for _, p := range rest {
		*errs = append(*errs, p.stop(ctx, unix.SIGKILL))
	}
	b.spawner.close()
	if b.api != nil {
		b.api.CloseIdleConnections()
	}
}

// keptLogs is how many failed runs' logs the cache holds.
const keptLogs = 20

// keepLogs moves the logs to logs/<id> in the cache.
func (b *Bed) keepLogs() error {
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, "logs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	kept := filepath.Join(dir, b.began.UTC().Format("20060102-150405-")+b.ID)
	if err := os.CopyFS(kept, os.DirFS(b.Logs)); err != nil {
		return err
	}
	b.step("logs are kept in %s", kept)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	for _, old := range names[:max(0, len(names)-keptLogs)] {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			return err
		}
	}
	return nil
}

func ips(addrs ...string) []net.IP {
	out := make([]net.IP, len(addrs))
	for i, a := range addrs {
		out[i] = net.ParseIP(a)
	}
	return out
}
