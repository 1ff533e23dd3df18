// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"fmt"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/controller/authority"
	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/logadapter"
	"github.com/cri-proxy/cri-proxy/controller/nodecondition"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/probes"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/rollout"
	"github.com/cri-proxy/cri-proxy/controller/rollout/follow"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/slimcache"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

// recorderName is the reporting controller of Events.
const recorderName = "cri-controller"

// wiring adds the controllers to a manager.
type wiring struct {
	Options

	manager ctrl.Manager
	log     logrus.FieldLogger
	// nodes is what all controllers command the nodes with.
	nodes *nodes.Client
	// jobs counts the restarts of all controllers.
	jobs *jobbudget.Budgets
	// requests counts for the controllers of requests and of their readiness gate.
	requests *recreate.Metrics
	probes   *probes.Server
	lookout  *kruise.Lookout
}

// Run runs the controller until ctx ends. o must be complete.
func Run(ctx context.Context, config *rest.Config, o Options, log logrus.FieldLogger) error {
	w := &wiring{Options: o, log: log, jobs: &jobbudget.Budgets{}, probes: probes.New()}
	types, err := scheme.New()
	if err != nil {
		return err
	}
	if w.requests, err = recreate.NewMetrics(metrics.Registry); err != nil {
		return err
	}
	if err := metrics.Registry.Register(buildMetric()); err != nil {
		return err
	}
	cached := slimcache.Options()
	own, err := w.connect(&cached)
	if err != nil {
		return err
	}
	defer func() { _ = w.nodes.Close() }() // the process ends
	if err := metrics.Registry.Register(w.nodes); err != nil {
		return err
	}

	hooks, keeper := w.Webhooks.server(&cached, log)
	w.manager, err = ctrl.NewManager(config, ctrl.Options{
		Scheme:                        types,
		Logger:                        logadapter.New(log),
		Cache:                         cached,
		WebhookServer:                 hooks,
		Metrics:                       metricsserver.Options{BindAddress: w.MetricsAddress},
		HealthProbeBindAddress:        "0", // see probes
		LeaderElection:                w.LeaderElect,
		LeaderElectionID:              LeaseName,
		LeaderElectionNamespace:       w.LeaderNamespace,
		LeaderElectionReleaseOnCancel: true, // Run returns, and the process ends, as soon as Start does
	})
	if err != nil {
		return fmt.Errorf("API server %s: %w", config.Host, err)
	}
	if err := w.manager.Add(manager.RunnableFunc(w.nodes.Run)); err != nil {
		return err
	}
	if own != nil {
		if err := w.setUpAuthority(own); err != nil {
			return err
		}
	}
	if err := w.nodes.ForgetRemoved(ctx, w.manager.GetCache()); err != nil {
		return err
	}
	for _, setUp := range []func(context.Context) error{
		w.setUpKruise, w.setUpPodReady, w.setUpRollout, w.setUpNodeCondition, w.setUpRights,
	} {
		if err := setUp(ctx); err != nil {
			return err
		}
	}
	if hooks != nil {
		if err := w.setUpWebhooks(keeper); err != nil {
			return err
		}
	}
	if err := w.probes.Serve(ctx, w.manager, w.ProbeAddress); err != nil {
		return err
	}
	log.WithFields(logrus.Fields{"version": version.Short(), "server": config.Host}).Info("cri-controller starts")
	if err := w.manager.Start(ctx); err != nil {
		return err
	}
	log.Info("cri-controller stops")
	return nil
}

// buildMetric is always 1. Its labels say what was built.
func buildMetric() prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "criproxy_controller_build_info",
		Help:        "1, with the version of the controller and the one of Go that it was built with.",
		ConstLabels: prometheus.Labels{"version": version.Short(), "goversion": runtime.Version()},
	})
	g.Set(1)
	return g
}

// connect makes the client for nodes. It returns the authority that the client's certificate comes
// from, or nil with files.
func (w *wiring) connect(cached *cache.Options) (*authority.Authority, error) {
	counters, err := nodes.NewMetrics(metrics.Registry)
	if err != nil {
		return nil, err
	}
	if w.Identity == IdentityFiles {
		w.nodes, err = nodes.New(w.Files, counters, w.log)
		return nil, err
	}
	own, err := w.newAuthority()
	if err != nil {
		return nil, err
	}
	w.nodes = nodes.NewWithCredentials(mtls.NewClientOf(own), counters)
	own.Replaced = func() { w.nodes.Forget(func(nodes.Node) bool { return true }) }
	cached.ByObject[&certificatesv1.CertificateSigningRequest{}] = authority.CacheOptions()
	return own, nil
}

func (w *wiring) newAuthority() (*authority.Authority, error) {
	namespace := w.Namespace
	if namespace == "" {
		var err error
		if namespace, err = PodNamespace(); err != nil {
			return nil, fmt.Errorf("no namespace for the CA, give --identity-namespace outside a pod: %w", err)
		}
	}
	counters, err := authority.NewMetrics(metrics.Registry)
	if err != nil {
		return nil, err
	}
	return &authority.Authority{Namespace: namespace, Settings: w.Lives, Metrics: counters, Log: w.log}, nil
}

// setUpAuthority adds what signs certificates.
func (w *wiring) setUpAuthority(a *authority.Authority) error {
	m := w.manager
	a.Client, a.Reader = m.GetClient(), m.GetAPIReader()
	if err := m.Add(a); err != nil {
		return err
	}
	signer := &authority.Signer{Authority: a, Recorder: m.GetEventRecorder(recorderName)}
	return signer.SetupWithManager(m, 2)
}

// setUpRecreate adds what carries out ContainerRecreateRequests.
func (w *wiring) setUpRecreate(ctx context.Context, gate *kruise.Gate) error {
	m := w.manager
	r := &recreate.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Nodes: w.nodes, NodePort: w.NodePort, Jobs: w.jobs,
		Recorder: m.GetEventRecorder(recorderName), Metrics: w.requests, Log: w.log, Gate: gate,
	}
	return r.SetupWithManager(ctx, m, w.Workers)
}

// setUpImagePull adds what carries out image jobs.
func (w *wiring) setUpImagePull(ctx context.Context, gate *kruise.Gate) error {
	counters, err := imagepull.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	m := w.manager
	recorder := m.GetEventRecorder(recorderName)
	jobs := &imagepull.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Nodes: w.nodes, NodePort: w.NodePort, Limits: w.Pins,
		Recorder: recorder, Metrics: counters, Log: w.log, Gate: gate,
	}
	if err := jobs.SetupWithManager(ctx, m, w.Workers); err != nil {
		return err
	}
	lists := &list.Reconciler{
		Client: m.GetClient(), Recorder: recorder, Metrics: counters, Log: w.log, Gate: gate,
	}
	return lists.SetupWithManager(ctx, m, w.Workers)
}

// setUpRollout adds what carries out rollouts.
func (w *wiring) setUpRollout(ctx context.Context) error {
	counters, err := notice.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	m := w.manager
	recorder := m.GetEventRecorder(recorderName)
	r := &rollout.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Nodes: w.nodes, Jobs: w.jobs, NodePort: w.NodePort,
		Recorder: recorder, Metrics: counters, Log: w.log,
	}
	if err := r.SetupWithManager(ctx, m, w.Workers); err != nil {
		return err
	}
	for _, kind := range []string{"StatefulSet", "DaemonSet"} {
		f := &follow.Reconciler{
			Client: m.GetClient(), Recorder: recorder, Metrics: counters, Log: w.log, Kind: kind,
		}
		if err := f.SetupWithManager(ctx, m, w.Workers); err != nil {
			return err
		}
	}
	g := &gates.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Recorder: recorder, Metrics: counters, Log: w.log,
	}
	return g.SetupWithManager(ctx, m, w.Workers)
}

// setUpNodeCondition adds what says on Nodes whether kubelet bypasses cri-proxy.
func (w *wiring) setUpNodeCondition(context.Context) error {
	counters, err := nodecondition.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	r := &nodecondition.Reconciler{
		Client: w.manager.GetClient(), Nodes: w.nodes, NodePort: w.NodePort, Metrics: counters, Log: w.log,
		Recorder: w.manager.GetEventRecorder(recorderName), Every: w.NodeConditionPeriod,
	}
	return r.SetupWithManager(w.manager)
}

// setUpRights adds what looks for the policies that decide who may use the controller's kinds.
func (w *wiring) setUpRights(context.Context) error {
	rights, err := admission.NewRights(w.manager.GetAPIReader(), w.log, metrics.Registry)
	if err != nil {
		return err
	}
	return w.manager.Add(rights)
}
