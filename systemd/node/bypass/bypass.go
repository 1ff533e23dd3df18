// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypass

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/backoff"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

const (
	// callTimeout bounds a call to the daemon or the runtime. Both answer in milliseconds, if at
	// all.
	callTimeout = 5 * time.Second
	// pollInterval is how often On checks whether operations have ended, and Off whether kubelet
	// has come back.
	pollInterval = 200 * time.Millisecond
	// kubeletTimeout is how long kubelet may take to start.
	kubeletTimeout = time.Minute
)

// Path is the proxy's place between kubelet and the runtime.
type Path struct {
	config *config.Config
	links  links
	out    io.Writer
}

// Open returns the path of the node that the configuration file describes. out gets what is done,
// for people.
func Open(file string, out io.Writer) (*Path, error) {
	c := config.Default()
	if err := c.Load(file, nil); err != nil {
		return nil, err
	}
	if err := errors.Join(c.Complete(), c.Validate()); err != nil {
		return nil, &config.InvalidError{Err: err}
	}
	return Of(c, out)
}

// Of is [Open] for a configuration that has been read.
func Of(c *config.Config, out io.Writer) (*Path, error) {
	l, err := linksOf(c)
	if err != nil {
		return nil, err
	}
	return &Path{config: c, links: l, out: out}, nil
}

func (p *Path) say(format string, args ...any) { _, _ = fmt.Fprintf(p.out, format+"\n", args...) }

// Dial returns a connection to a socket. The first call dials, and fails at once if nobody listens.
func Dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithAuthority("localhost"), grpc.WithDisableServiceConfig(),
	)
}

// Options say how On leads kubelet past the proxy.
type Options struct {
	// Reason is shown in the status and in refusals of operations.
	Reason string
	// Automatic is set by crash-guard: no person requested the bypass.
	Automatic bool
	// Force cancels operations, and bypasses the proxy even if operations do not end, or if kubelet
	// does not dial the symlink.
	Force bool
	// Wait is how long operations may take to end.
	Wait time.Duration
	// Anyway is for a kubelet that is pointed elsewhere next: On does not check that it dials the
	// symlink.
	Anyway bool
}

// KubeletSocket is the symlink beside the CRI socket, which kubelet dials.
func KubeletSocket(c *config.Config) string {
	return filepath.Join(filepath.Dir(c.Listen.Path), "kubelet.sock")
}

// RuntimeFiles are the sockets and the files beside the CRI socket.
func RuntimeFiles(c *config.Config) ([]string, error) {
	l, err := linksOf(c)
	return []string{l.kubelet, l.runtime, l.crashes, l.proxy, c.AdminSocket}, err
}

// On leads kubelet past the proxy, to the runtime. Before, it removes what operations have
// prepared, so that kubelet does not see it.
func (p *Path) On(ctx context.Context, o Options) error {
	dir := p.config.StateDir
	if s := bypassstate.Read(dir); s != nil {
		if is, err := p.links.isBypassed(); err == nil && is {
			p.say("bypassed already, %s", s)
			return nil
		}
	}
	if !o.Automatic && !o.Anyway {
		if remark := p.unreachable(ctx); remark != "" && !o.Force {
			return errors.New(remark)
		} else if remark != "" {
			p.say("%s", remark)
		}
	}
	// From here on operations are refused.
	state := &bypassstate.State{Since: time.Now(), Reason: o.Reason, Automatic: o.Automatic}
	if err := state.Write(dir); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	there, err := p.serves(ctx)
	if err == nil && there {
		there, err = p.endOperations(ctx, o)
	}
	if err != nil {
		return errors.Join(err, bypassstate.Forget(dir))
	}
	if !there {
		p.removeStaged(ctx)
	}
	if err := p.links.lead(true); err != nil {
		return errors.Join(err, bypassstate.Forget(dir))
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := takeover.Redial(call, dir); err != nil {
		p.say("kubelet was not told to dial anew (%v): calls go through cri-proxy until it does", err)
	}
	p.say("kubelet is led past cri-proxy, to %s", p.links.target)
	return nil
}

// serves reports whether there is a daemon. Its sockets do not tell: they are there without it.
func (p *Path) serves(ctx context.Context) (bool, error) {
	conn, err := takeover.Dial(ctx, p.config.StateDir)
	if err != nil || conn == nil {
		return false, err
	}
	return true, conn.Close()
}

// endOperations waits until the daemon has no running operation. It reports whether the daemon
// answers.
func (p *Path) endOperations(ctx context.Context, o Options) (there bool, err error) {
	conn, err := Dial(p.config.AdminSocket)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ops := opsv1.NewOpsClient(conn)
	ctx, cancel := context.WithTimeout(ctx, o.Wait+callTimeout)
	defer cancel()
	asked := map[string]bool{}
	said := ""
	for until := time.Now().Add(o.Wait); ; {
		call, done := context.WithTimeout(ctx, callTimeout)
		list, err := ops.ListOperations(call, &opsv1.ListOperationsRequest{ActiveOnly: true})
		done()
		if err != nil {
			p.say("cri-proxy does not answer on %s (%s)", p.config.AdminSocket, status.Code(err))
			return false, nil
		}
		var names []string
		for _, op := range list.GetOperations() {
			names = append(names, fmt.Sprintf("%s %s of %s/%s (%s)", op.GetKind(), op.GetUid(),
				op.GetPod().GetNamespace(), op.GetPod().GetName(),
				strings.TrimPrefix(op.GetPhase().String(), "PHASE_")))
			if o.Force && !asked[op.GetUid()] {
				asked[op.GetUid()] = true
				p.abort(ctx, ops, op)
			}
		}
		if len(names) == 0 {
			return true, nil
		}
		what := strings.Join(names, "; ")
		if time.Now().After(until) {
			if o.Force {
				p.say("not waiting any longer for %s: kubelet may see what it has prepared", what)
				return true, nil
			}
			return true, fmt.Errorf("operations are under way: %s; wait, cancel them (cri-proxy ctl cancel UID), "+
				"or use --force", what)
		}
		if what != said {
			said = what
			p.say("waiting for %s", what)
		}
		if err := backoff.Sleep(ctx, pollInterval); err != nil {
			return true, err
		}
	}
}

// abort ends an operation. One that is past the point of no return runs to its end.
func (p *Path) abort(ctx context.Context, ops opsv1.OpsClient, op *opsv1.Operation) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var err error
	if op.GetKind() == opsv1.KindUpgrade {
		_, err = ops.AbortUpgrade(ctx, &opsv1.AbortUpgradeRequest{Uid: op.GetUid()})
	} else {
		_, err = ops.CancelOperation(ctx, &opsv1.CancelOperationRequest{
			Uid: op.GetUid(), Reason: "cri-proxy is bypassed",
		})
	}
	if err != nil && status.Code(err) != codes.FailedPrecondition {
		p.say("%s not cancelled: %v", op.GetUid(), err)
	}
}

// unreachable says why a bypass does not reach kubelet. It is empty if the bypass does, or if
// nobody knows.
func (p *Path) unreachable(ctx context.Context) string {
	k, err := kubelet.Find(ctx, kubelet.DefaultUnit)
	if err != nil {
		return ""
	}
	containers, images, err := k.Dials(p.links.proxy)
	if err != nil || !containers && !images {
		return ""
	}
	return fmt.Sprintf("kubelet dials %s itself, where a bypass does not reach it: "+
		"set its containerRuntimeEndpoint to unix://%s (cri-proxy install does) and "+
		"restart it", p.links.proxy, p.links.kubelet)
}

// stagedTimeout bounds the removal of staged containers.
const stagedTimeout = 30 * time.Second

// removeStaged removes staged containers where no daemon does: kubelet would take them for its own.
// Such a container has not been started, or waits at its gate. If no other container runs in its
// place any more, removeStaged opens the gate instead.
func (p *Path) removeStaged(ctx context.Context) {
	if err := p.eachStaged(ctx); err != nil {
		p.say("staged containers not looked for: %v", err)
	}
}

func (p *Path) eachStaged(ctx context.Context) error {
	conn, err := Dial(p.links.target)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, stagedTimeout)
	defer cancel()
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	type slot struct{ sandbox, name string }
	running := map[slot]int{}
	for _, c := range list.GetContainers() {
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			running[slot{c.GetPodSandboxId(), c.GetMetadata().GetName()}]++
		}
	}
	for _, c := range list.GetContainers() {
		token := c.GetAnnotations()[view.StagedAnnotation]
		if token == "" || strings.ContainsAny(token, "/.") {
			continue
		}
		switch c.GetState() {
		case runtimeapi.ContainerState_CONTAINER_CREATED:
			err = removeContainer(ctx, rt, c.GetId(), false)
		case runtimeapi.ContainerState_CONTAINER_RUNNING:
			g := gate.At(filepath.Join(gate.Dir(p.config.StateDir), token))
			if g.Await(ctx, func() error { return gate.ErrNotHeld }) != nil {
				continue // it has passed: an operation that is over
			}
			if running[slot{c.GetPodSandboxId(), c.GetMetadata().GetName()}] == 1 {
				if err := errors.Join(g.Open(), g.Remove()); err != nil {
					p.say("container %s is held back: %v", c.GetId(), err)
				}
				continue
			}
			err = errors.Join(removeContainer(ctx, rt, c.GetId(), true), g.Remove())
		default:
			continue
		}
		if err != nil {
			p.say("staged container %s not removed: %v", c.GetId(), err)
			continue
		}
		p.say("removed the staged container %s", c.GetId())
	}
	return nil
}

// removeContainer removes a container. A container at its gate gets no grace period: its
// application does not run yet.
func removeContainer(ctx context.Context, rt runtimeapi.RuntimeServiceClient, id string, runs bool) error {
	if runs {
		if _, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			return err
		}
	}
	_, err := rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	return err
}

// Off leads kubelet through the proxy again. kubelet comes when it dials the next time. If unit is
// not empty, Off restarts this systemd unit of kubelet and waits until kubelet has called.
func (p *Path) Off(ctx context.Context, force bool, unit string) error {
	if err := p.probe(ctx); err != nil {
		if !force {
			return fmt.Errorf("cri-proxy does not serve, so kubelet stays where it is: %w; "+
				"see journalctl -u 'cri-proxy@*', or use --force", err)
		}
		p.say("cri-proxy does not serve: %v", err)
	}
	began := time.Now()
	err := errors.Join(atomicfile.Remove(p.links.crashes), p.links.lead(false), bypassstate.Forget(p.config.StateDir))
	if err != nil {
		return err
	}
	p.say("kubelet is led through cri-proxy again, with its next dial")
	if unit == "" {
		p.say("it keeps the connection that it has: restart kubelet (containers run on), " +
			"or wait until the runtime restarts")
		return nil
	}
	if err := systemctl.Run(ctx, "restart", unit); err != nil {
		return err
	}
	return p.awaitKubelet(ctx, began)
}

// probe asks whether the proxy answers on its CRI socket.
func (p *Path) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return Probe(ctx, p.links.proxy)
}

// Probe asks whether the proxy answers on its CRI socket. The runtime takes no part, and the proxy
// does not count the call as one of kubelet's.
func Probe(ctx context.Context, socket string) error {
	conn, err := Dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Invoke(ctx, "/criproxy.probe.v1.Health/Check",
		&healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{})
}

// awaitKubelet waits for a call on the CRI socket.
func (p *Path) awaitKubelet(ctx context.Context, since time.Time) error {
	conn, err := Dial(p.config.AdminSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, kubeletTimeout)
	defer cancel()
	ops := opsv1.NewOpsClient(conn)
	for {
		info, err := ops.NodeInfo(ctx, &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true))
		if err == nil && info.GetKubeletLastCall().AsTime().After(since) {
			p.say("kubelet is back")
			return nil
		}
		if backoff.Sleep(ctx, pollInterval) != nil {
			return errors.Join(fmt.Errorf("kubelet has not called within %s: "+
				"does its containerRuntimeEndpoint say unix://%s?",
				kubeletTimeout, p.links.kubelet), err)
		}
	}
}

// Apply makes the symlinks what the state says, when the machine starts.
func (p *Path) Apply() error { return p.links.lead(bypassstate.Read(p.config.StateDir) != nil) }

// Status prints whether the proxy is bypassed, and what is wrong about that.
func (p *Path) Status(ctx context.Context) error {
	if remark := p.unreachable(ctx); remark != "" {
		p.say("%s", remark)
	}
	is, err := p.links.isBypassed()
	if err != nil {
		return fmt.Errorf("%w; cri-proxy bypass apply makes it", err)
	}
	s := bypassstate.Read(p.config.StateDir)
	switch {
	case is && s != nil:
		p.say("on, %s", s)
	case is:
		p.say("on: %s leads to the runtime, though nobody has said so; "+
			"cri-proxy bypass apply puts it right", p.links.kubelet)
	case s != nil:
		p.say("off, though it was asked for %s; cri-proxy bypass apply puts it right", s)
	default:
		p.say("off")
	}
	return nil
}
