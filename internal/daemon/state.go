// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/prepull"
)

// state is what only one process on the node has at a time: the files in the state directory, and
// the engine, puller and view that work with them.
type state struct {
	view     *view.View
	engine   *ops.Engine
	puller   *prepull.Puller
	registry *prometheus.Registry // its own, because it may be opened again

	stop context.CancelFunc // nil: not running
	done chan struct{}      // closed when the engine and the puller have ended
}

// openState opens the state. When it returns, kubelet may be served: the view knows what the
// journal has, and what the predecessor has transferred.
func (n *node) openState(ctx context.Context, carry view.State) (err error) {
	c := n.config
	st := &state{view: view.New(), registry: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			err = fmt.Errorf("state directory %s: %w", c.StateDir, errors.Join(err, st.close()))
		}
	}()
	var high func() int // nil: the number counts
	if c.Images.MaxDiskPercent == config.LikeKubelet {
		high = n.callers.HighThreshold
	}
	st.puller, err = prepull.Open(prepull.Options{
		StateDir: c.StateDir, Conn: n.upstream.Conn(), Log: n.log, Registerer: st.registry, Tracer: n.tracing.Tracer(),
		Parallel: c.Images.Parallel, BytesPerSecond: c.Images.BytesPerSecond, Hosts: n.registries.Hosts,
		MaxDiskPercent: float64(c.Images.MaxDiskPercent), HighThreshold: high,
		Plugins: n.plugins, VerifyAccess: c.Images.VerifyAccess,
	})
	if err != nil {
		return err
	}
	var pods podsapi.Pods
	if socket := c.Kubelet.PodsSocket; socket != "" {
		pods = podsapi.New(socket)
	}
	st.view.TakeOver(carry)
	st.engine, err = ops.Open(ctx, ops.Options{
		StateDir:   c.StateDir,
		Conn:       n.upstream.Conn(),
		View:       st.view,
		Log:        n.log,
		Registerer: st.registry,
		Tracer:     n.tracing.Tracer(),
		Method:     c.Restart.Method,
		CDISpecDir: c.Restart.CDISpecDir,
		Images:     st.puller,
		Pods:       pods,
	})
	if err != nil {
		return err
	}
	n.cri.SetDirector(interceptors.New(interceptors.Options{
		View: st.view, Records: st.engine.Records(), Runtime: n.upstream.Conn(), Log: n.log,
		Pulls: st.puller, Images: st.puller, Overrides: st.engine.Overrides(), Pods: st.engine,
		Successors: st.engine, Judge: st.engine, Registerer: st.registry,
	}))
	n.state.Store(st)
	if s := bypassstate.Read(c.StateDir); s != nil {
		// kubelet, which does not call through here, would see what operations prepare. An
		// operation that has stopped a container runs to its end.
		st.engine.CancelAll("cri-proxy is bypassed on this node " + s.String())
	}
	return nil
}

// run lets the engine and the puller work until stop. failed gets their errors.
func (st *state) run(ctx context.Context, failed func(error)) {
	ctx, st.stop = context.WithCancel(context.WithoutCancel(ctx))
	st.done = make(chan struct{})
	go func() { // ends with stop
		defer close(st.done)
		pulls := make(chan error, 1)
		go func() { pulls <- st.puller.Run(ctx) }()
		if err := st.engine.Run(ctx); err != nil {
			failed(fmt.Errorf("operations: %w", err))
		}
		if err := <-pulls; err != nil {
			failed(fmt.Errorf("pulls: %w", err))
		}
	}()
}

// end stops the engine and the puller. It reports whether they have ended in time, and before ctx.
// The next process continues the operations.
func (st *state) end(ctx context.Context, within time.Duration) bool {
	if st.stop == nil {
		return true
	}
	st.stop()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-st.done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// close closes the files. The engine and the puller must have ended.
func (st *state) close() error {
	var errs []error
	if st.engine != nil {
		errs = append(errs, st.engine.Close())
	}
	if st.puller != nil {
		errs = append(errs, st.puller.Close())
	}
	return errors.Join(errs...)
}

// gatherers returns the metrics of the node and, if it has one, of its state.
func (n *node) gatherers() prometheus.Gatherers {
	all := prometheus.Gatherers{n.registry}
	if st := n.state.Load(); st != nil {
		all = append(all, st.registry)
	}
	return all
}
