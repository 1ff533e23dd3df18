// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cri-proxy/cri-proxy/test/testbed"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kube "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

type gapOptions struct {
	out, plot string // files, not written when empty
	criProxy  string
	only      string
	rounds    int
	series    int
	period    time.Duration
	rate      int
}

const (
	// seriesPeriod is the rhythm of the clients of back-offs, which run side by side and
	// last 10 s and more.
	seriesPeriod = 5 * time.Millisecond
	// seriesLength is how many restarts come in a row.
	seriesLength = 5
	// quiet is the least time between two restarts; up to another quiet comes on top by chance, so
	// that no restart keeps step with kubelet's relist, which comes once a second.
	quiet = time.Second
	// after is how long the clients go on after the new process has answered.
	after = 300 * time.Millisecond
	// timeout is for one restart or one pod. kubelet's back-off before the fifth start is 80 s.
	timeout = 3 * time.Minute
	// apart is the time between the first restarts of series that run side by side.
	apart = 700 * time.Millisecond
	// ahead is how many pods of series that run one after another are made at once.
	ahead = 5
)

// gapBench is one run of the command gap.
type gapBench struct {
	gapOptions
	bed     *testbed.Bed
	api     kube.WithWatch
	ways    []*way
	runtime map[*testbed.Node]runtimeapi.RuntimeServiceClient
	criConn map[*testbed.Node]*grpc.ClientConn // to the runtime
	nodeOps map[*testbed.Node]*nodeOps
	conns   []*grpc.ClientConn
	report  GapReport
	pods    int // made so far, for their names
}

// The nodes of the cluster: kubelet on the runtime's own socket, and a proxy for each method of
// restart. All stay as they are for the whole run, so that the ways can take turns.
var gapNodes = []string{"direct", "plain", "pidfd", "gate"}

func gap(ctx context.Context, o gapOptions) (err error) {
	g := &gapBench{
		gapOptions: o, runtime: map[*testbed.Node]runtimeapi.RuntimeServiceClient{},
		criConn: map[*testbed.Node]*grpc.ClientConn{}, nodeOps: map[*testbed.Node]*nodeOps{},
	}
	g.report = GapReport{Time: time.Now().UTC(), Rounds: o.rounds, PeriodMS: millis(o.period),
		SeriesPeriodMS: millis(seriesPeriod), PerSecond: o.rate, LoadBefore: load()}
	g.bed, err = testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Nodes: len(gapNodes), Log: os.Stderr, ProxyBinary: o.criProxy,
		KeepLogs: func() bool { return err != nil && ctx.Err() == nil },
	})
	if err != nil {
		return err
	}
	defer func() {
		for _, c := range g.conns {
			c.Close()
		}
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err = errors.Join(err, g.bed.Close(closing))
	}()
	if err := g.prepare(ctx); err != nil {
		return err
	}
	if err := g.alternate(ctx); err != nil {
		return err
	}
	for _, s := range []struct {
		way        string
		sideBySide bool
	}{{"gate", false}, {"cri-stop", true}} {
		if err := g.inARow(ctx, s.way, s.sideBySide); err != nil {
			return fmt.Errorf("series of %s: %w", s.way, err)
		}
	}
	g.report.LoadAfter = load()
	g.report.finish()
	g.report.print(os.Stdout)
	return g.report.write(o.out, o.plot)
}

// prepare makes the cluster what gapNodes says, and has the images on every node.
func (g *gapBench) prepare(ctx context.Context) error {
	config, err := clientcmd.BuildConfigFromFlags("", g.bed.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	if g.api, err = kube.NewWithWatch(config, kube.Options{Scheme: clientgoscheme.Scheme}); err != nil {
		return err
	}
	for i, n := range g.bed.Nodes {
		conn, err := n.DialRuntime()
		if err != nil {
			return err
		}
		g.conns = append(g.conns, conn)
		g.runtime[n], g.criConn[n] = runtimeapi.NewRuntimeServiceClient(conn), conn
		for _, image := range []string{"app:1", "app:2"} {
			if _, err := runtimeapi.NewImageServiceClient(conn).
				PullImage(ctx,
					&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: g.bed.Image(image)}}); err != nil {
				return fmt.Errorf("pull %s: %w", image, err)
			}
		}
		if i == 0 {
			err = undoProxy(ctx, n)
		} else {
			err = setMethod(ctx, n, gapNodes[i])
		}
		if err != nil {
			return fmt.Errorf("node %s: %w", gapNodes[i], err)
		}
	}
	for _, n := range g.bed.Nodes {
		if err := g.bed.WaitNodeReady(ctx, n.NodeName); err != nil {
			return err
		}
	}
	if err := g.bed.CreateNamespace(ctx, gapNamespace); err != nil {
		return err
	}
	if err := g.makeWays(ctx); err != nil {
		return err
	}
	return g.report.machine(ctx, g)
}

// undoProxy has a node's kubelet use the runtime's own socket.
func undoProxy(ctx context.Context, n *testbed.Node) error {
	if err := n.StopKubelet(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	if err := n.KillProxy(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	n.CRISocket = n.RuntimeSocket
	return n.StartKubelet(ctx)
}

// setMethod restarts a node's proxy with the best method that it may use, and without the debug log
// of tests.
func setMethod(ctx context.Context, n *testbed.Node, method string) error {
	b, err := os.ReadFile(n.ProxyConfig())
	if err != nil {
		return err
	}
	config := map[string]any{}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return err
	}
	config["restart"] = map[string]any{"method": method}
	config["log"] = map[string]any{"level": "info", "format": "text"}
	if b, err = yaml.Marshal(config); err != nil {
		return err
	}
	if err := os.WriteFile(n.ProxyConfig(), b, 0o644); err != nil {
		return err
	}
	return n.RestartProxy(ctx, syscall.SIGTERM)
}

// alternate measures every way once per round, starting with another one each round.
func (g *gapBench) alternate(ctx context.Context) error {
	pods := map[*way]*gapPod{}
	for round := -1; round < g.rounds; round++ { // the first one warms up
		if err := g.renew(ctx, pods); err != nil {
			return err
		}
		for i := range g.ways {
			w := g.ways[(i+max(round, 0))%len(g.ways)]
			if w.every > 1 && round%w.every != 0 {
				continue
			}
			s, err := g.measure(ctx, w, pods[w])
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s.Round = round
			pods[w].restarted(w)
			if err != nil {
				s.Error = err.Error()
				pods[w].spent = true
				g.report.note("%s, round %d: no measurement, see its sample", w.name, round+1)
			}
			if round >= 0 {
				g.report.way(w.name).add(s)
			}
			progress("round %d/%d  %-9s %s", round+1, g.rounds, w.name, s)
		}
	}
	for w := range pods {
		pods[w].spent = true
	}
	return g.remove(ctx, pods)
}

// renew removes the pods that are spent and makes those that are missing.
func (g *gapBench) renew(ctx context.Context, pods map[*way]*gapPod) error {
	if err := g.remove(ctx, pods); err != nil {
		return err
	}
	made, mctx := errgroup.WithContext(ctx)
	var mu sync.Mutex // guards pods
	for _, w := range g.ways {
		mu.Lock()
		missing := pods[w] == nil
		mu.Unlock()
		if !missing {
			continue
		}
		g.pods++
		name := fmt.Sprintf("%s-%d", w.name, g.pods)
		made.Go(func() error {
			p, err := w.create(mctx, name)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			pods[w] = p
			return nil
		})
	}
	return made.Wait()
}

func (g *gapBench) remove(ctx context.Context, pods map[*way]*gapPod) error {
	removed, rctx := errgroup.WithContext(ctx)
	for w, p := range pods {
		if p.spent {
			delete(pods, w)
			removed.Go(func() error { return g.removePod(rctx, p) })
		}
	}
	return removed.Wait()
}

// measure restarts a pod's container once under the eyes of two clients.
func (g *gapBench) measure(ctx context.Context, w *way, p *gapPod) (Sample, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var s Sample
	if w.ready != nil {
		if err := w.ready(ctx); err != nil {
			return s, err
		}
	}
	eye := startWatcher(ctx, p.address, g.period)
	defer eye.stop()
	old, err := eye.other(ctx, "")
	if err != nil {
		return s, err
	}
	requests := startRequests(ctx, p.address, g.rate)
	defer requests.stop()
	exit, err := g.watchExit(ctx, w.node, p)
	if err != nil {
		return s, err
	}
	defer exit.stop()
	if err := pause(ctx, quiet+rand.N(quiet)); err != nil {
		return s, err
	}
	op, err := w.restart(ctx, p, func(address string) { eye.follow(address); requests.follow(address) })
	if err != nil {
		return s, err
	}
	fresh, err := eye.other(ctx, old)
	if err != nil {
		return s, err
	}
	exited, err := exit.wait(ctx)
	if err != nil {
		return s, err
	}
	if err := pause(ctx, after); err != nil {
		return s, err
	}
	requests.stop()
	eye.stop()
	s.Sent, s.Failed, s.Failure = requests.result()
	s.Gap = millis(eye.gap(old, fresh))
	began, err := time.Parse(time.RFC3339Nano, fresh)
	if err != nil {
		return s, err
	}
	s.ProcessGap = millis(began.Sub(exited))
	if op != nil {
		node := millis(op.GetGap().AsDuration())
		s.NodeGap, s.Method = &node, op.GetMethod()
	}
	return s, nil
}

// inARow measures series of restarts, each in a pod of its own, either all at the same time or one
// after another.
func (g *gapBench) inARow(ctx context.Context, name string, sideBySide bool) error {
	i := slices.IndexFunc(g.ways, func(w *way) bool { return w.name == name })
	if i < 0 || g.series == 0 {
		return nil
	}
	w := g.ways[i]
	progress("%d series of %d restarts in a row: %s", g.series, seriesLength, w.title)
	at, period := ahead, g.period
	if sideBySide {
		at, period = g.series, seriesPeriod
	}
	result := SeriesResult{Name: w.name, Title: w.title, SideBySide: sideBySide}
	for first := 0; first < g.series; first += at {
		n := min(at, g.series-first)
		pods := make([]*gapPod, n)
		rows := make([][]float64, n)
		made, mctx := errgroup.WithContext(ctx)
		for i := range pods {
			made.Go(func() (err error) {
				pods[i], err = w.create(mctx, fmt.Sprintf("row-%s-%d", w.name, first+i))
				return err
			})
		}
		if err := made.Wait(); err != nil {
			return err
		}
		series, sctx := errgroup.WithContext(ctx)
		if !sideBySide {
			series.SetLimit(1)
		}
		for i, p := range pods {
			series.Go(func() (err error) {
				if sideBySide {
					if err := pause(sctx, time.Duration(i)*apart); err != nil {
						return err
					}
				}
				rows[i], err = g.row(sctx, w, p, period)
				if err == nil {
					progress("series %d/%d  %-9s %.1f ms", first+i+1, g.series, w.name, rows[i])
				}
				return err
			})
		}
		if err := series.Wait(); err != nil {
			return err
		}
		result.Samples = append(result.Samples, rows...)
		removed, rctx := errgroup.WithContext(ctx)
		for _, p := range pods {
			removed.Go(func() error { return g.removePod(rctx, p) })
		}
		if err := removed.Wait(); err != nil {
			return err
		}
	}
	g.report.Series = append(g.report.Series, result)
	return nil
}

// row restarts one pod's container again and again and returns the gaps in milliseconds.
func (g *gapBench) row(ctx context.Context, w *way, p *gapPod, period time.Duration) ([]float64, error) {
	eye := startWatcher(ctx, p.address, period)
	defer eye.stop()
	old, err := eye.other(ctx, "")
	if err != nil {
		return nil, err
	}
	var gaps []float64
	for nth := range seriesLength {
		if err := pause(ctx, quiet); err != nil {
			return nil, err
		}
		once, cancel := context.WithTimeout(ctx, timeout)
		_, err := w.restart(once, p, eye.follow)
		fresh := ""
		if err == nil {
			fresh, err = eye.other(once, old)
		}
		cancel()
		if err != nil {
			return nil, fmt.Errorf("restart %d of pod %s: %w", nth+1, p.name, err)
		}
		gaps = append(gaps, millis(eye.gap(old, fresh)))
		old = fresh
	}
	return gaps, nil
}

// pause waits for a time, not for something.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func millis(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// write writes the JSON and the plot.
func (r *GapReport) write(out, plot string) error {
	if out != "" {
		b, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(out, append(b, '\n'), 0o644); err != nil {
			return err
		}
	}
	if plot != "" {
		return os.WriteFile(plot, []byte(r.svg()), 0o644)
	}
	return nil
}

// redraw makes table and plot anew from the JSON of an earlier run.
func redraw(from, plot string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	var r GapReport
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(from), err)
	}
	r.print(os.Stdout)
	return r.write("", plot)
}

// wanted reports whether a way is to be measured: all, or those in a list with commas.
func wanted(only, name string) bool {
	return only == "" || slices.Contains(strings.Split(only, ","), name)
}

// running reports whether the pod's container runs and the pod has an address.
func running(p *corev1.Pod) bool {
	return p.Status.PodIP != "" && len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready
}
