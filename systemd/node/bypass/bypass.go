// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypass

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
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
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

const (
	// callPatience bounds a question to the daemon or the runtime: both answer in milliseconds, if they do.
	callPatience = 5 * time.Second
	// lookEvery is how often is looked whether operations have ended, or kubelet has come back.
	lookEvery = 200 * time.Millisecond
	// kubeletPatience is how long kubelet takes to start.
	kubeletPatience = time.Minute
)

// path is the proxy's place in kubelet's path.
type path struct {
	config *config.Config
	links  links
	out    io.Writer
}

func (p *path) say(format string, args ...any) { _, _ = fmt.Fprintf(p.out, format+"\n", args...) }

// Dial returns a connection to a socket; it is made with the first call, which fails at once if nobody is there.
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

// Options of [On].
type Options struct {
	Reason string
	// Force cancels operations, and does not wait for those that cannot be any longer than Wait.
	Force bool
	Wait  time.Duration
	// Anyway is for a kubelet that is pointed elsewhere next, so that it need not be reached now.
	Anyway bool
	Out    io.Writer // what is done, for people
}

// On leads kubelet past the proxy, as `cri-proxy bypass on` does.
func On(ctx context.Context, c *config.Config, o Options) error {
	l, err := linksOf(c)
	if err != nil {
		return err
	}
	p := &path{config: c, links: l, out: o.Out}
	return p.on(ctx, onOptions{reason: o.Reason, force: o.Force, wait: o.Wait, anyway: o.Anyway})
}

// Forget ends a bypass where there is no proxy any more: what is installed next serves.
func Forget(c *config.Config) error { return remove(statePath(c.StateDir)) }

// KubeletSocket is what kubelet dials: the symlink beside the CRI socket.
func KubeletSocket(c *config.Config) string {
	return filepath.Join(filepath.Dir(c.Listen.Path), "kubelet.sock")
}

// RuntimeFiles are what lies beside the CRI socket, and the sockets.
func RuntimeFiles(c *config.Config) ([]string, error) {
	l, err := linksOf(c)
	return []string{l.kubelet, l.runtime, l.crashes, l.proxy, c.AdminSocket}, err
}

// onOptions say how kubelet is led past the proxy.
type onOptions struct {
	reason    string
	automatic bool
	force     bool          // also if operations do not end
	anyway    bool          // also if kubelet is not reached
	wait      time.Duration // for operations to end
}

// on leads kubelet past the proxy. What operations have prepared is taken away before kubelet could see it.
func (p *path) on(ctx context.Context, o onOptions) error {
	dir := p.config.StateDir
	if s := Read(dir); s != nil {
		if is, err := p.links.isBypassed(); err == nil && is {
			p.say("bypassed already, %s", s)
			return nil
		}
	}
	if !o.automatic && !o.anyway {
		if remark := p.unreachable(ctx); remark != "" && !o.force {
			return errors.New(remark)
		} else if remark != "" {
			p.say("%s", remark)
		}
	}
	// From here on operations are refused.
	if err := (&State{Since: time.Now(), Reason: o.reason, Automatic: o.automatic}).write(dir); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	there, err := p.serves(ctx)
	if err == nil && there {
		there, err = p.endOperations(ctx, o)
	}
	if err != nil {
		return errors.Join(err, remove(statePath(dir)))
	}
	if !there {
		p.removeStaged(ctx)
	}
	if err := p.links.lead(true); err != nil {
		return errors.Join(err, remove(statePath(dir)))
	}
	call, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	if _, err := takeover.Redial(call, dir); err != nil {
		p.say("kubelet was not told to dial anew (%v): calls go through cri-proxy until it does", err)
	}
	p.say("kubelet is led past cri-proxy, to %s", p.links.target)
	return nil
}

// serves reports whether there is a daemon. Its sockets do not tell: they are there without it.
func (p *path) serves(ctx context.Context) (bool, error) {
	conn, err := takeover.Dial(ctx, p.config.StateDir)
	if err != nil || conn == nil {
		return false, err
	}
	return true, conn.Close()
}

// endOperations waits until the daemon has no operation under way. It reports whether the daemon answers.
func (p *path) endOperations(ctx context.Context, o onOptions) (there bool, err error) {
	conn, err := Dial(p.config.AdminSocket)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ops := opsv1.NewOpsClient(conn)
	ctx, cancel := context.WithTimeout(ctx, o.wait+callPatience)
	defer cancel()
	asked := map[string]bool{}
	said := ""
	for until := time.Now().Add(o.wait); ; {
		call, done := context.WithTimeout(ctx, callPatience)
		list, err := ops.ListOperations(call, &opsv1.ListOperationsRequest{ActiveOnly: true})
		done()
		if err != nil {
			p.say("cri-proxy does not answer on %s (%s)", p.config.AdminSocket, status.Code(err))
			return false, nil
		}
		var names []string
		for _, op := range list.GetOperations() {
			names = append(names, fmt.Sprintf("%s %s of %s/%s (%s)", op.GetKind(), op.GetUid(), op.GetPod().GetNamespace(), op.GetPod().GetName(),
				strings.TrimPrefix(op.GetPhase().String(), "PHASE_")))
			if o.force && !asked[op.GetUid()] {
				asked[op.GetUid()] = true
				p.takeBack(ctx, ops, op)
			}
		}
		if len(names) == 0 {
			return true, nil
		}
		what := strings.Join(names, "; ")
		if time.Now().After(until) {
			if o.force {
				p.say("not waiting any longer for %s: kubelet may see what it has prepared", what)
				return true, nil
			}
			return true, fmt.Errorf("operations are under way: %s; wait, cancel them (cri-proxy ctl cancel UID), or use --force", what)
		}
		if what != said {
			said = what
			p.say("waiting for %s", what)
		}
		timer := time.NewTimer(lookEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return true, ctx.Err()
		}
	}
}

// takeBack ends an operation, unless it has gone too far: then it runs to its end.
func (p *path) takeBack(ctx context.Context, ops opsv1.OpsClient, op *opsv1.Operation) {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	var err error
	if op.GetKind() == "Upgrade" {
		_, err = ops.AbortUpgrade(ctx, &opsv1.AbortUpgradeRequest{Uid: op.GetUid()})
	} else {
		_, err = ops.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: op.GetUid(), Reason: "cri-proxy is bypassed"})
	}
	if err != nil && status.Code(err) != codes.FailedPrecondition {
		p.say("%s not cancelled: %v", op.GetUid(), err)
	}
}

// unreachable says why a bypass does not reach kubelet, empty if it does or nothing is known.
func (p *path) unreachable(ctx context.Context) string {
	k, err := kubelet.Find(ctx, kubelet.DefaultUnit)
	if err != nil {
		return ""
	}
	containers, images, err := k.Dials(p.links.proxy)
	if err != nil || !containers && !images {
		return ""
	}
	return fmt.Sprintf("kubelet dials %s itself, where a bypass does not reach it: set its containerRuntimeEndpoint to unix://%s (cri-proxy install does) and restart it", p.links.proxy, p.links.kubelet)
}

// stagedPatience bounds the removal of what is staged.
const stagedPatience = 30 * time.Second

// removeStaged takes away what was prepared and does not run yet, where no daemon can: kubelet would take it for its own. That is a container
// that was made and not started, and one that waits at its gate; if nothing else runs in its place any more, the gate is opened.
func (p *path) removeStaged(ctx context.Context) {
	if err := p.eachStaged(ctx); err != nil {
		p.say("staged containers not looked for: %v", err)
	}
}

func (p *path) eachStaged(ctx context.Context) error {
	conn, err := Dial(p.links.target)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, stagedPatience)
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
		token := c.GetAnnotations()[interceptors.StagedAnnotation]
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

// removeContainer removes a container. One that waits at its gate has nothing to say to a signal.
func removeContainer(ctx context.Context, rt runtimeapi.RuntimeServiceClient, id string, runs bool) error {
	if runs {
		if _, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
			return err
		}
	}
	_, err := rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	return err
}

// off leads kubelet back through the proxy. It comes with its next dial, unless kubelet is to be restarted, a systemd unit.
func (p *path) off(ctx context.Context, force bool, unit string) error {
	if err := p.probe(ctx); err != nil {
		if !force {
			return fmt.Errorf("cri-proxy does not serve, so kubelet stays where it is: %w; see journalctl -u 'cri-proxy@*', or use --force", err)
		}
		p.say("cri-proxy does not serve: %v", err)
	}
	began := time.Now()
	if err := errors.Join(remove(p.links.crashes), p.links.lead(false), remove(statePath(p.config.StateDir))); err != nil {
		return err
	}
	p.say("kubelet is led through cri-proxy again, with its next dial")
	if unit == "" {
		p.say("it keeps the connection that it has: restart kubelet (containers run on), or wait until the runtime restarts")
		return nil
	}
	if out, err := exec.CommandContext(ctx, "systemctl", "restart", unit).CombinedOutput(); err != nil {
		return fmt.Errorf("restarting %s: %w: %s", unit, err, strings.TrimSpace(string(out)))
	}
	return p.awaitKubelet(ctx, began)
}

// probe asks the proxy's CRI socket, as its own watchdog does.
func (p *path) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	return Probe(ctx, p.links.proxy)
}

// Probe asks whether the proxy answers on its CRI socket; neither the runtime nor what is counted as kubelet's calls has a part in it.
func Probe(ctx context.Context, socket string) error {
	conn, err := Dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Invoke(ctx, "/criproxy.probe.v1.Health/Check", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{})
}

// awaitKubelet waits for a call on the CRI socket.
func (p *path) awaitKubelet(ctx context.Context, since time.Time) error {
	conn, err := Dial(p.config.AdminSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, kubeletPatience)
	defer cancel()
	ops := opsv1.NewOpsClient(conn)
	for {
		info, err := ops.NodeInfo(ctx, &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true))
		if err == nil && info.GetKubeletLastCall().AsTime().After(since) {
			p.say("kubelet is back")
			return nil
		}
		timer := time.NewTimer(lookEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(fmt.Errorf("kubelet has not called within %s: does its containerRuntimeEndpoint say unix://%s?", kubeletPatience, p.links.kubelet), err)
		}
	}
}

// apply makes the symlinks what the state says, for the start of the machine.
func (p *path) apply() error { return p.links.lead(Read(p.config.StateDir) != nil) }

// status says how it is.
func (p *path) status(ctx context.Context) error {
	if remark := p.unreachable(ctx); remark != "" {
		p.say("%s", remark)
	}
	is, err := p.links.isBypassed()
	if err != nil {
		return fmt.Errorf("%w; cri-proxy bypass apply makes it", err)
	}
	s := Read(p.config.StateDir)
	switch {
	case is && s != nil:
		p.say("on, %s", s)
	case is:
		p.say("on: %s leads to the runtime, though nobody has said so; cri-proxy bypass apply puts it right", p.links.kubelet)
	case s != nil:
		p.say("off, though it was asked for %s; cri-proxy bypass apply puts it right", s)
	default:
		p.say("off")
	}
	return nil
}
