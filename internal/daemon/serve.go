// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/daemon/profile"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/proxy"
)

const (
	// opsGrace is how long the ops servers wait for their calls at shutdown. A watch lasts as long
	// as its operation; the client opens it again.
	opsGrace = 2 * time.Second
	// adminMaxMessage bounds requests of the admin socket, as those of the port are bounded
	// (internal/mtls).
	adminMaxMessage = 16 << 20
	// adminHello is how long a client of the admin socket may stay silent after it has connected:
	// the server waits for it when it ends, and in a takeover kubelet's calls wait for the server.
	adminHello = 5 * time.Second
	// admin is the name of the listener for root.
	admin = "admin"
)

// Run serves until ctx ends. Then it drains until all calls are over, the drain timeout has passed
// or hard ends. It returns the first error because of which the node is not served; a drain that
// had to cut calls is one too. If another process has taken over, Run returns a [TakenOverError].
func Run(ctx, hard context.Context, c *config.Config, log *logrus.Logger) error {
	sockets, err := activated(c, log)
	if err != nil {
		return err
	}
	defer func() { _ = sockets.close() }()
	if err := sockets.unused(); err != nil {
		return err
	}

	// Listening comes before the state is opened, because "in use by pid N" says
	// more than a locked journal. Nothing is accepted until the view is armed.
	cri, err := sockets.listen("cri", c.Listen.Path, func() (net.Listener, error) { return listenCRI(c) })
	if err != nil {
		return err
	}
	defer cri.Close()
	n, err := newNode(c, cri.Addr().String(), log)
	if err != nil {
		return err
	}
	d := &daemon{
		node: n, log: log, notify: notifier{log: log}, sockets: sockets,
		failed: make(chan error, 8), requests: make(chan *request), stopping: make(chan struct{}),
	}
	d.drains = &drains{here: func() int {
		if !d.draining.Load() {
			return -1
		}
		return int(d.cri.Stats().InFlight)
	}}
	n.registry.MustRegister(d.drains)
	if err := n.identify(); err != nil {
		return errors.Join(fmt.Errorf("ops: %w", err), n.close())
	}
	// This process finds everything that can be wrong with it before it asks the serving process
	// for the state.
	var before *predecessor
	if sockets.has("cri") {
		if before, err = d.askForState(ctx); err != nil {
			return errors.Join(err, n.close())
		}
	}
	defer before.close()
	if err := d.openState(ctx, before.view()); err != nil {
		return errors.Join(err, n.close())
	}
	before.follow(d.state.Load(), &d.drains.before)
	err = d.start(ctx, hard, cri)
	if err == nil {
		err = before.serving()
	}
	if err == nil {
		// The engine outlives ctx: an operation may need the drained calls answered.
		d.state.Load().run(ctx, d.fail)
		log.WithFields(logrus.Fields{
			"listen": d.listen, "endpoint": n.upstream.Endpoint(), "admin": c.AdminSocket, "node": c.NodeName,
		}).Info("serving")
		d.notify.send("READY=1")
		var over bool
		if over, err = d.untilEnd(ctx, hard); over {
			return err
		}
	}
	return errors.Join(err, d.shutdown(hard))
}

// untilEnd returns when the daemon has to end. over is true if it has ended already, because
// another process has taken over.
func (d *daemon) untilEnd(ctx, hard context.Context) (over bool, err error) {
	for {
		select {
		case <-ctx.Done():
			return false, nil
		case err := <-d.failed:
			d.log.WithError(err).Error("a listener failed, shutting down")
			return false, err
		case r := <-d.requests:
			to, err := d.transfer(ctx, r)
			switch {
			case to != nil:
				return true, d.leave(ctx, hard, r, to)
			case err != nil:
				return false, err
			}
		}
	}
}

// daemon is the running node: its listeners and its workers.
type daemon struct {
	*node
	log      logrus.FieldLogger
	notify   notifier
	sockets  *sockets
	failed   chan error // the first error of a server
	draining atomic.Bool
	// handing is set during a takeover, until it is clear which process serves.
	handing atomic.Bool

	drains     *drains
	stopping   chan struct{}  // closed when the daemon does not serve any more
	workers    sync.WaitGroup // servers, watchdog and status
	stopWork   context.CancelFunc
	opsServers []*grpc.Server
	http       *httpServer
	takeover   *takeover.Listener
	// stopEnrol ends the renewal of the node's identity. Nil: there is none.
	stopEnrol context.CancelFunc
	requests  chan *request // for the state
	// given is the view of a state that another process has taken over. It knows the remaining
	// calls.
	given *view.View
}

// start serves kubelet first, then the rest.
func (d *daemon) start(ctx, hard context.Context, cri net.Listener) error {
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	d.stopWork = stopWork
	d.sayIfRuntimeMissing()
	d.serve("cri", func() error { return d.cri.Serve(d.callers.Watch(cri)) })
	if err := d.startServers(ctx); err != nil {
		return err
	}
	// The first probe comes before READY: a unit that is active can serve.
	if err := d.probe(hard); err != nil {
		return err
	}
	d.workers.Go(func() { d.notify.watchdog(work, d.alive) })
	d.workers.Go(func() { d.reportStatus(work) })
	return nil
}

// startServers opens what belongs to the state: commands, metrics, and the socket for the
// successor.
func (d *daemon) startServers(ctx context.Context) error {
	l, err := d.sockets.listen(admin, d.config.AdminSocket, func() (net.Listener, error) {
		return proxy.Listen(d.config.AdminSocket, proxy.ListenOptions{Mode: 0o600, UID: -1, GID: -1})
	})
	if err != nil {
		return fmt.Errorf("adminSocket: %w", err)
	}
	d.serveOps(admin, l, grpc.MaxRecvMsgSize(adminMaxMessage), grpc.ConnectionTimeout(adminHello))
	if o := d.config.Ops; d.creds != nil {
		l, err := d.sockets.listen("ops", o.Address, func() (net.Listener, error) { return listenTCP(ctx, o.Address) })
		if err != nil {
			return fmt.Errorf("ops.address: %w", err)
		}
		d.serveOps("ops", mtls.LimitListener(l), d.creds.GRPC()...)
		d.log.WithFields(logrus.Fields{"address": l.Addr().String(), "clients": d.allowedClients()}).
			Info("ops API with mutual TLS")
		d.startEnrolling(ctx)
	}
	if d.config.MetricsAddress != "" {
		l, err := d.sockets.listen("metrics", d.config.MetricsAddress, func() (net.Listener, error) {
			return listenTCP(ctx, d.config.MetricsAddress)
		})
		if err != nil {
			return fmt.Errorf("metricsAddress: %w", err)
		}
		d.http = newHTTPServer(d)
		h := d.http
		d.serve("metrics", func() error { return h.Serve(l) })
		d.log.WithField("address", l.Addr().String()).Info("metrics")
	}
	d.listenForSuccessor()
	return nil
}

// stopServers ends what startServers has started.
func (d *daemon) stopServers(hard context.Context, grace time.Duration) {
	if d.takeover != nil {
		_ = d.takeover.Close()
		d.takeover = nil
	}
	d.stopEnrolling()
	d.stopOps(hard, grace)
	d.http.stop()
	d.http = nil
}

// serve runs one server until shutdown stops it.
func (d *daemon) serve(name string, run func() error) {
	d.workers.Go(func() {
		if err := run(); err != nil {
			d.fail(fmt.Errorf("%s: %w", name, err))
		}
	})
}

func (d *daemon) serveOps(name string, l net.Listener, o ...grpc.ServerOption) {
	s := d.opsServer(name, o...)
	if name == admin {
		opsv1.RegisterDebugServer(s, &profile.Server{Stopping: d.stopping})
	}
	d.opsServers = append(d.opsServers, s)
	d.serve(name, func() error {
		if err := s.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
}

func (d *daemon) fail(err error) {
	select {
	case d.failed <- err:
	default: // one is enough
	}
}

// probe calls the daemon's own CRI listener once.
func (d *daemon) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	return probe(ctx, d.listen, d.probing)
}

// alive is the check of the watchdog. While the daemon drains or is being taken over, it accepts
// nothing on purpose: then it is enough that the process runs.
func (d *daemon) alive(ctx context.Context) error {
	elsewhere := func() bool { return d.draining.Load() || d.handing.Load() }
	if elsewhere() {
		return nil
	}
	err := d.probe(ctx)
	if elsewhere() {
		return nil
	}
	return err
}

// engineGrace is how long a shutdown waits until operations reach a point where they can be left.
// The start of a container must not be cut off, and takes a fraction of it.
const engineGrace = 5 * time.Second

// shutdown drains the CRI server, event streams last, then ends the ops API, the engine and the
// rest. Running operations stop at a point where the next start continues them.
func (d *daemon) shutdown(hard context.Context) error {
	d.draining.Store(true)
	close(d.stopping)
	d.notify.stopping(d.config.DrainTimeout)
	drain, cancel := context.WithTimeout(hard, d.config.DrainTimeout)
	defer cancel()
	var errs []error
	if err := d.cri.Drain(drain); err != nil {
		errs = append(errs, err)
	}
	d.stopServers(hard, opsGrace)
	engineOver := true
	if st := d.state.Load(); st != nil {
		engineOver = st.end(context.WithoutCancel(hard), engineGrace)
	}
	if !engineOver {
		// It waits for a container to stop, which may take minutes, and kubelet waits for the next
		// process.
		d.log.Warn("stopping in the middle of an operation; the next start takes it up")
	}
	d.stopWork()
	d.workers.Wait()
	if engineOver { // else it still uses what close closes, and the process ends anyway
		errs = append(errs, d.close())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.log.Info("stopped")
	return nil
}

// stopOps ends the ops servers, and cuts calls that are not over in time.
func (d *daemon) stopOps(hard context.Context, within time.Duration) {
	grace, cancel := context.WithTimeout(hard, within)
	defer cancel()
	var over sync.WaitGroup
	for _, s := range d.opsServers {
		over.Go(func() {
			graceful := make(chan struct{})
			over.Go(func() {
				defer close(graceful)
				s.GracefulStop()
			})
			select {
			case <-graceful:
			case <-grace.Done():
				s.Stop()
			}
		})
	}
	over.Wait()
	d.opsServers = nil
}

func registerHealth(s *grpc.Server) {
	h := health.NewServer()
	h.SetServingStatus(opsv1.Ops_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(s, h)
}
