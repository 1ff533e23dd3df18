// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/daemon/caller"
	"github.com/cri-proxy/cri-proxy/internal/daemon/callrecord"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/tracing"
	"github.com/cri-proxy/cri-proxy/internal/version"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/enrol"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
	"github.com/cri-proxy/cri-proxy/ops/prepull/credentialprovider"
	"github.com/cri-proxy/cri-proxy/ops/prepull/runtimeconfig"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// runtimeVersionTimeout bounds the one runtime call of NodeInfo, which must describe the node even
// if the runtime hangs.
const runtimeVersionTimeout = time.Second

// node is the wired daemon without its listeners. It answers CRI calls only once it has a state.
type node struct {
	config   *config.Config
	log      logrus.FieldLogger
	listen   string // the CRI socket, which systemd may have chosen
	started  time.Time
	registry *prometheus.Registry
	upstream *proxy.Upstream
	calls    *callrecord.File // nil: not recorded
	cri      *proxy.Server
	probing  string                      // tells the own probes from other calls
	plugins  *credentialprovider.Plugins // nil: none
	// callers have dialled the CRI socket, kubelet among them.
	callers *caller.Callers
	// registries tells how containerd reaches registries.
	registries *runtimeconfig.Source
	state      atomic.Pointer[state] // nil: another process has it
	creds      *mtls.Server          // of the ops API over TCP; nil: off
	enroller   *enrol.Enroller       // nil: the identity comes from files
	commands   *commands
	tracing    *tracing.Tracing // nil: off

	mu             sync.Mutex // guards all following fields
	runtimeName    string
	runtimeVersion string
}

// newNode makes everything that needs no state.
func newNode(c *config.Config, listen string, log logrus.FieldLogger) (_ *node, err error) {
	n := &node{
		config: c, log: log, listen: listen, started: time.Now(), registry: prometheus.NewRegistry(),
		commands: newCommands(), probing: newProbeToken(), callers: caller.New("/proc", log),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	n.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
		n.bypassMetric(),
		buildMetric(),
		n.commands,
	)
	if err := makeStateDir(c.StateDir, log); err != nil {
		return nil, err
	}
	if n.upstream, err = proxy.NewUpstream(c.RuntimeEndpoint, proxy.UpstreamOptions{Log: log}); err != nil {
		return nil, &config.InvalidError{Err: err}
	}
	socket, err := config.SocketPath(c.RuntimeEndpoint)
	if err != nil {
		return nil, &config.InvalidError{Err: err}
	}
	n.registries = runtimeconfig.New(runtimeconfig.Options{
		Socket: socket, HostsDir: c.Images.RegistryHostsDir, Conn: n.upstream.Conn(),
		Log: log.WithField("component", "prepull"),
	})
	if path := c.Images.CredentialProviderConfig; path != "" {
		bin := c.Images.CredentialProviderBinDir
		if n.plugins, err = credentialprovider.Load(path, bin, n.callers.Environ, n.log); err != nil {
			return nil, &config.InvalidError{Err: fmt.Errorf("images.credentialProviderConfig: %w", err)}
		}
	}
	if t := c.Tracing; t.Endpoint != "" {
		n.tracing, err = tracing.Start(context.Background(), tracing.Options{
			Endpoint: t.Endpoint, SamplingRatePerMillion: t.SamplingRatePerMillion,
			NodeName: c.NodeName, Version: version.Short(), Log: log,
		})
		if err != nil {
			return nil, err
		}
	}
	o := proxy.Options{
		Log: log, Registerer: n.registry, Register: registerProbe, Probe: n.probing, Tracer: n.tracing.Tracer(),
	}
	if c.RecordCalls != "" {
		if n.calls, err = callrecord.Open(c.RecordCalls, log); err != nil {
			return nil, err
		}
		o.Recorder = n.calls
	}
	n.cri = proxy.NewServer(n.upstream, o)
	return n, nil
}

// close releases what newNode opened, and the state. The servers must have stopped.
func (n *node) close() error {
	var errs []error
	if st := n.state.Load(); st != nil {
		errs = append(errs, st.close())
	}
	if n.upstream != nil {
		errs = append(errs, n.upstream.Close())
	}
	n.tracing.Close()
	if n.calls != nil {
		errs = append(errs, n.calls.Close())
	}
	return errors.Join(errs...)
}

// makeStateDir makes the directory, for this user only: the recorded requests in it have the
// environment of containers, and with it secrets.
func makeStateDir(dir string, log logrus.FieldLogger) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("stateDir: %w; make it writable for this user or choose another", err)
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("stateDir: %w", err)
	}
	if mode := fi.Mode().Perm(); mode&0o077 != 0 {
		log.WithField("dir", dir).Warnf("state directory has mode %04o, closing it to others: "+
			"it holds the environment of containers", mode)
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("stateDir: %w; it must be closed to other users (chmod 0700)", err)
		}
	}
	return nil
}

// info describes what the engine does not know of the node. See [ops.InfoFunc].
func (n *node) info(ctx context.Context) *opsv1.NodeInfoResponse {
	st := n.cri.Stats()
	state := n.upstream.State()
	info := &opsv1.NodeInfoResponse{
		Version:          version.Short(),
		NodeName:         n.config.NodeName,
		StartTime:        timestamppb.New(n.started),
		Listen:           n.listen,
		Bypass:           n.bypassed(),
		KubeletUserAgent: st.LastUserAgent,
		UnknownMethods:   st.UnknownMethods,
		Identity:         n.identity(),
		Pid:              int32(os.Getpid()), //nolint:gosec // PID_MAX_LIMIT is 2^22
		ConfigFile:       n.config.File,
		ConfigSha256:     n.config.FileSHA256,
		Runtime:          &opsv1.Runtime{Endpoint: n.upstream.Endpoint(), State: state.String()},
		Counters: &opsv1.Counters{
			Calls:             st.Calls,
			CallErrors:        st.CallErrors,
			Intercepted:       st.Intercepted,
			InterceptorFaults: st.InterceptorFaults,
			InFlight:          st.InFlight,
		},
	}
	if !st.LastCall.IsZero() {
		info.KubeletLastCall = timestamppb.New(st.LastCall)
	}
	if last := n.commands.last.Load(); last != nil {
		info.ControllerLastCall, info.ControllerName = timestamppb.New(last.at), last.name
	}
	info.Runtime.Name, info.Runtime.Version = n.runtime(ctx, state)
	return info
}

// runtime returns name and version of the runtime. If it does not answer, runtime returns what it
// said last.
func (n *node) runtime(ctx context.Context, state connectivity.State) (name, version string) {
	if state == connectivity.Ready {
		ctx, cancel := context.WithTimeout(ctx, runtimeVersionTimeout)
		defer cancel()
		v, err := runtimeapi.NewRuntimeServiceClient(n.upstream.Conn()).Version(ctx, &runtimeapi.VersionRequest{})
		n.mu.Lock()
		defer n.mu.Unlock()
		if err == nil {
			n.runtimeName, n.runtimeVersion = v.GetRuntimeName(), v.GetRuntimeVersion()
		}
		return n.runtimeName, n.runtimeVersion
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.runtimeName, n.runtimeVersion
}

// sayIfRuntimeMissing logs once, at start, why the proxy does not reach the runtime. That is no
// error: the runtime may come later, and the upstream logs when it does.
func (n *node) sayIfRuntimeMissing() {
	path, err := config.SocketPath(n.upstream.Endpoint())
	if err != nil {
		return
	}
	log := n.log.WithField("endpoint", n.upstream.Endpoint())
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		log.Warn("runtime socket does not exist yet, waiting for it; if it never comes, " +
			"start the runtime or set runtimeEndpoint (--runtime-endpoint)")
	case errors.Is(err, fs.ErrPermission):
		log.WithError(err).Warn("runtime socket is out of reach for this user, waiting; run as root")
	case err != nil:
		log.WithError(err).Warn("runtime socket cannot be looked at, waiting")
	case fi.Mode().Type() != fs.ModeSocket:
		log.Warnf("runtime endpoint is no socket but %s, waiting for one; "+
			"set runtimeEndpoint (--runtime-endpoint)", fi.Mode())
	}
}

// opsServer makes a gRPC server with the commands of the state on it. name is that of the listener.
func (n *node) opsServer(name string, o ...grpc.ServerOption) *grpc.Server {
	before, after := n.commands.options(name)
	guard := ops.Guard(n.log)
	after = append(after, grpc.ChainUnaryInterceptor(ops.Audit(n.log)))
	// The guard is around everything, and once more around the command itself: so a panic of the
	// command is counted and audited.
	last := []grpc.ServerOption{grpc.ChainUnaryInterceptor(n.refuseBypassed)}
	s := grpc.NewServer(slices.Concat(guard, before, o, after, guard, last)...)
	st := n.state.Load()
	opsv1.RegisterOpsServer(s, ops.NewServer(st.engine, n.info))
	opsv1.RegisterImagesServer(s, prepull.NewServer(st.puller))
	registerHealth(s)
	return s
}
