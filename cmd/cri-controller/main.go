// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/controller/authority"
	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/nodecondition"
	"github.com/cri-proxy/cri-proxy/controller/rollout"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

// leaseName is the Lease that decides which replica works; deploy/rbac grants it.
const leaseName = "cri-controller"

// settings are the flags.
type settings struct {
	kubeconfig       string
	nodePort         int
	identity         string
	namespace        string
	lives            authority.Settings
	tls              controller.TLSFiles
	metricsAddress   string
	probeAddress     string
	leaderElect      bool
	leaderNamespace  string
	logLevel, format string
	workers          int
	nodeEvery        time.Duration
	pins             imagepull.Limits
	kruiseEvery      time.Duration
	webhook          webhookSettings
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// execute runs the command line and returns the exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cmd := newCommand()
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	if err := cmd.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "cri-controller:", err)
		return 1
	}
	return 0
}

func newCommand() *cobra.Command {
	var s settings
	cmd := &cobra.Command{
		Use:           "cri-controller",
		Short:         "Restart containers in place, change their images in place and pull images ahead of time, as custom resources say",
		Version:       version.Short(),
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return run(cmd.Context(), s, cmd.ErrOrStderr())
		},
	}
	cmd.SetVersionTemplate(fmt.Sprintf("cri-controller {{.Version}}, %s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH))
	f := cmd.Flags()
	f.StringVar(&s.kubeconfig, "kubeconfig", "", "kubeconfig file; empty means $KUBECONFIG, then the pod's service account")
	f.IntVar(&s.nodePort, "node-port", controller.DefaultNodePort, "TCP port of cri-proxy's command interface on the nodes; a node's annotation "+controller.OpsAddressAnnotation+" overrides it")
	f.StringVar(&s.identity, "identity", "", "csr: this controller is the authority of the nodes' certificates and of its own; files: it has one from --tls-cert-file; empty means files if that is given, else csr")
	f.StringVar(&s.namespace, "identity-namespace", "", "csr: namespace of Secret "+authority.SecretName+" and ConfigMap "+identity.BundleName+"; empty means the pod's own")
	f.DurationVar(&s.lives.Life, "certificate-life", 72*time.Hour, "csr: how long a node's certificate, and this controller's own, is good; nodes renew theirs at 70 to 80 %")
	f.DurationVar(&s.lives.CALife, "ca-life", 365*24*time.Hour, "csr: how long the CA is good; the next one is made at 70 %")
	f.StringVar(&s.tls.Cert, "tls-cert-file", "", "files: PEM certificate this controller shows to nodes; read again when it changes")
	f.StringVar(&s.tls.Key, "tls-key-file", "", "files: PEM key of that certificate")
	f.StringVar(&s.tls.CA, "tls-ca-file", "", "files: PEM file with the CAs that node certificates must chain to")
	f.StringVar(&s.metricsAddress, "metrics-bind-address", ":8080", "address of the Prometheus metrics; 0 switches them off")
	f.StringVar(&s.probeAddress, "health-probe-bind-address", ":8081", "address of /healthz and /readyz; 0 switches them off")
	f.BoolVar(&s.leaderElect, "leader-elect", false, "work only while holding the Lease "+leaseName+", so that several replicas can run")
	f.StringVar(&s.leaderNamespace, "leader-election-namespace", "", "namespace of that Lease; empty means the pod's own")
	f.StringVar(&s.logLevel, "log-level", "info", "error, warn, info, debug or trace")
	f.StringVar(&s.format, "log-format", "text", "text or json")
	f.IntVar(&s.workers, "workers", 8, "requests worked on at the same time")
	f.DurationVar(&s.nodeEvery, "node-condition-period", nodecondition.DefaultEvery, "how often a node is asked whether its cri-proxy is bypassed, for the condition "+string(controller.BypassedCondition)+" on Nodes")
	f.DurationVar(&s.pins.PinFor, "image-pin-max", 7*24*time.Hour, "the longest time for which an ImagePullJob keeps its image from kubelet's image garbage collection; 0 means 744h, which is what nodes take")
	f.Int32Var(&s.pins.PinPercent, "image-pin-percent", 40, "how much of a node's image file system the pins of all ImagePullJobs may hold together, in percent; 0 means no bound")
	f.DurationVar(&s.kruiseEvery, "openkruise-period", kruise.Every, "how often it is looked whether OpenKruise is in the cluster, which its kinds are left to then")
	s.webhook.flags(f)
	cmd.AddCommand(uninstallCommand())
	return cmd
}

func run(ctx context.Context, s settings, stderr io.Writer) error {
	log, err := newLog(s, stderr)
	if err != nil {
		return err
	}
	// Below the container's memory limit, with room for what is not on the heap; GOMEMLIMIT wins. Without a limit there is none.
	if limit, err := memlimit.Set(memlimit.WithRatio(0.85)); err == nil && limit != math.MaxInt64 {
		log.WithField("bytes", limit).Debug("memory limit")
	}
	if s.workers < 1 {
		return fmt.Errorf("--workers must be at least 1, not %d", s.workers)
	}
	if s.pins.PinFor < 0 {
		return fmt.Errorf("--image-pin-max must not be negative, but 0 or a duration such as 168h, not %s", s.pins.PinFor)
	}
	if s.pins.PinPercent < 0 || s.pins.PinPercent > 100 {
		return fmt.Errorf("--image-pin-percent must be between 0, which is no bound, and 100, not %d", s.pins.PinPercent)
	}
	if s.nodeEvery < time.Second {
		return fmt.Errorf("--node-condition-period must be at least 1s, not %s", s.nodeEvery)
	}
	if s.kruiseEvery < time.Second {
		return fmt.Errorf("--openkruise-period must be at least 1s, not %s", s.kruiseEvery)
	}
	if s.nodePort < 1 || s.nodePort > 65535 {
		return fmt.Errorf("--node-port must be between 1 and 65535, not %d", s.nodePort)
	}
	if err := s.checkIdentity(); err != nil {
		return err
	}
	if err := s.webhook.complete(); err != nil {
		return err
	}
	logr := controller.NewLogr(log)
	ctrllog.SetLogger(logr)
	klog.SetLogger(logr)

	config, err := restConfig(s.kubeconfig)
	if err != nil {
		return err
	}
	config.UserAgent = "cri-controller/" + version.Short()
	scheme, err := controller.NewScheme()
	if err != nil {
		return err
	}
	counters, err := controller.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	if err := metrics.Registry.Register(buildMetric()); err != nil {
		return err
	}
	cached := controller.CacheOptions()
	var own *authority.Authority
	var nodes *controller.GRPCNodes
	if s.identity == identityFiles {
		nodes, err = controller.NewGRPCNodes(s.tls, counters, log)
	} else if own, err = newAuthority(s, log); err == nil {
		nodes = controller.NewGRPCNodesOf(mtls.NewClientOf(own), counters)
		own.Replaced = func() { nodes.Forget(func(controller.Node) bool { return true }) }
		cached.ByObject[&certificatesv1.CertificateSigningRequest{}] = authority.CacheOptions()
	}
	if err != nil {
		return err
	}
	defer func() { _ = nodes.Close() }() // the process ends
	if err := metrics.Registry.Register(nodes); err != nil {
		return err
	}

	hooks, keeper := s.webhook.server(&cached, log)
	m, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        scheme,
		Logger:                        logr,
		Cache:                         cached,
		WebhookServer:                 hooks,
		Metrics:                       metricsserver.Options{BindAddress: s.metricsAddress},
		HealthProbeBindAddress:        "0", // see health
		LeaderElection:                s.leaderElect,
		LeaderElectionID:              leaseName,
		LeaderElectionNamespace:       s.leaderNamespace,
		LeaderElectionReleaseOnCancel: true, // run returns, and the process ends, as soon as Start does
	})
	if err != nil {
		return fmt.Errorf("API server %s: %w", config.Host, err)
	}
	if err := m.Add(manager.RunnableFunc(nodes.Run)); err != nil {
		return err
	}
	if own != nil {
		if err := setUpAuthority(m, own); err != nil {
			return err
		}
	}
	if err := nodes.ForgetRemoved(ctx, m.GetCache()); err != nil {
		return err
	}
	probes := &health{ready: map[string]healthz.Checker{"ping": healthz.Ping}}
	jobs := &controller.JobBudgets{}
	lookout, err := setUpKruise(m, s.kruiseEvery, log, func(ctx context.Context, gate *kruise.Gate) error {
		r := &controller.ContainerRecreateReconciler{
			Jobs:      jobs,
			Client:    m.GetClient(),
			APIReader: m.GetAPIReader(),
			Nodes:     nodes,
			NodePort:  s.nodePort,
			Recorder:  m.GetEventRecorder("cri-controller"),
			Metrics:   counters,
			Log:       log,
			Gate:      gate,
		}
		if err := r.SetupWithManager(ctx, m, s.workers); err != nil {
			return err
		}
		return setUpImagePull(ctx, m, s, nodes, gate, log)
	})
	if err != nil {
		return err
	}
	probes.notes = append(probes.notes, note{"OpenKruise", lookout.Note})
	if err := setUpPodReady(m, s, lookout, counters, log); err != nil {
		return err
	}
	if err := setUpRollout(ctx, m, s, nodes, jobs, log); err != nil {
		return err
	}
	if err := setUpNodeCondition(m, s, nodes, log); err != nil {
		return err
	}
	rights, err := admission.NewRights(m.GetAPIReader(), log, metrics.Registry)
	if err != nil {
		return err
	}
	if err := m.Add(rights); err != nil {
		return err
	}
	if hooks != nil {
		if err := setUpWebhooks(m, keeper, probes, lookout, log); err != nil {
			return err
		}
	}
	if err := probes.serve(ctx, m, s.probeAddress); err != nil {
		return err
	}
	log.WithFields(logrus.Fields{"version": version.Short(), "server": config.Host}).Info("cri-controller starts")
	if err := m.Start(ctx); err != nil {
		return err
	}
	log.Info("cri-controller stops")
	return nil
}

// buildMetric is always 1; what it is about is in its labels.
func buildMetric() prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "criproxy_controller_build_info", Help: "1, with the version of the controller and the one of Go that it was built with.",
		ConstLabels: prometheus.Labels{"version": version.Short(), "goversion": runtime.Version()},
	})
	g.Set(1)
	return g
}

// Values of --identity.
const (
	identityCSR   = "csr"
	identityFiles = "files"
)

// checkIdentity settles which of the two ways it is.
func (s *settings) checkIdentity() error {
	files := s.tls != controller.TLSFiles{}
	if s.identity == "" {
		s.identity = identityCSR
		if files {
			s.identity = identityFiles
		}
	}
	switch {
	case s.identity != identityCSR && s.identity != identityFiles:
		return fmt.Errorf("--identity must be csr or files, not %q", s.identity)
	case s.identity == identityFiles && (s.tls.Cert == "" || s.tls.Key == "" || s.tls.CA == ""):
		return errors.New("--tls-cert-file, --tls-key-file and --tls-ca-file are all needed with --identity=files: nodes take commands over mutual TLS only")
	case s.identity == identityCSR && files:
		return errors.New("--tls-cert-file, --tls-key-file and --tls-ca-file have no effect with --identity=csr; remove them, or give --identity=files")
	case s.identity == identityCSR:
		return s.lives.Validate()
	}
	return nil
}

// namespaceFile has the namespace of a pod's ServiceAccount.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

func newAuthority(s settings, log logrus.FieldLogger) (*authority.Authority, error) {
	if s.namespace == "" {
		text, err := os.ReadFile(namespaceFile)
		if err != nil {
			return nil, fmt.Errorf("no namespace for the CA, give --identity-namespace outside a pod: %w", err)
		}
		s.namespace = strings.TrimSpace(string(text))
	}
	counters, err := authority.NewMetrics(metrics.Registry)
	if err != nil {
		return nil, err
	}
	return &authority.Authority{Namespace: s.namespace, Settings: s.lives, Metrics: counters, Log: log}, nil
}

// setUpAuthority adds what signs certificates.
func setUpAuthority(m ctrl.Manager, a *authority.Authority) error {
	a.Client, a.Reader = m.GetClient(), m.GetAPIReader()
	if err := m.Add(a); err != nil {
		return err
	}
	signer := &authority.Signer{Authority: a, Recorder: m.GetEventRecorder("cri-controller")}
	return signer.SetupWithManager(m, 2)
}

// setUpNodeCondition adds what says on Nodes whether kubelet is led past cri-proxy.
func setUpNodeCondition(m ctrl.Manager, s settings, nodes nodecondition.Nodes, log logrus.FieldLogger) error {
	counters, err := nodecondition.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	r := &nodecondition.Reconciler{
		Client: m.GetClient(), Nodes: nodes, NodePort: s.nodePort, Recorder: m.GetEventRecorder("cri-controller"), Metrics: counters, Log: log, Every: s.nodeEvery,
	}
	return r.SetupWithManager(m)
}

// setUpImagePull adds what carries out image jobs.
func setUpImagePull(ctx context.Context, m ctrl.Manager, s settings, nodes imagepull.Nodes, gate *kruise.Gate, log logrus.FieldLogger) error {
	counters, err := imagepull.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	recorder := m.GetEventRecorder("cri-controller")
	jobs := &imagepull.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Nodes: nodes, NodePort: s.nodePort, Limits: s.pins, Recorder: recorder, Metrics: counters, Log: log, Gate: gate,
	}
	if err := jobs.SetupWithManager(ctx, m, s.workers); err != nil {
		return err
	}
	lists := &imagepull.ListReconciler{Client: m.GetClient(), Recorder: recorder, Metrics: counters, Log: log, Gate: gate}
	return lists.SetupWithManager(ctx, m, s.workers)
}

// setUpRollout adds what carries out rollouts.
func setUpRollout(ctx context.Context, m ctrl.Manager, s settings, nodes rollout.Nodes, jobs *controller.JobBudgets, log logrus.FieldLogger) error {
	counters, err := rollout.NewMetrics(metrics.Registry)
	if err != nil {
		return err
	}
	recorder := m.GetEventRecorder("cri-controller")
	r := &rollout.Reconciler{
		Client: m.GetClient(), APIReader: m.GetAPIReader(), Nodes: nodes, Jobs: jobs, NodePort: s.nodePort, Recorder: recorder, Metrics: counters, Log: log,
	}
	if err := r.SetupWithManager(ctx, m, s.workers); err != nil {
		return err
	}
	for _, kind := range []string{"StatefulSet", "DaemonSet"} {
		f := &rollout.FollowReconciler{Client: m.GetClient(), Recorder: recorder, Metrics: counters, Log: log, Kind: kind}
		if err := f.SetupWithManager(ctx, m, s.workers); err != nil {
			return err
		}
	}
	g := &rollout.GateReconciler{Client: m.GetClient(), APIReader: m.GetAPIReader(), Recorder: recorder, Metrics: counters, Log: log}
	return g.SetupWithManager(ctx, m, s.workers)
}

// restConfig prefers the flag, then $KUBECONFIG, then the pod's service account.
func restConfig(path string) (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = path
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("no API server to talk to, give --kubeconfig outside a pod: %w", err)
	}
	// client-go's own limit of 5 calls a second, and kind of object, would be what rollouts and webhooks wait for. The API server has its priorities.
	config.QPS = -1
	return config, nil
}

func newLog(s settings, out io.Writer) (*logrus.Logger, error) {
	level, err := logrus.ParseLevel(s.logLevel)
	if err != nil {
		return nil, fmt.Errorf("--log-level: %w", err)
	}
	log := logrus.New()
	log.SetOutput(out)
	log.SetLevel(level)
	switch s.format {
	case "text":
		log.SetFormatter(&logrus.TextFormatter{DisableColors: true, FullTimestamp: true})
	case "json":
		log.SetFormatter(&logrus.JSONFormatter{})
	default:
		return nil, fmt.Errorf("--log-format must be text or json, not %q", s.format)
	}
	return log, nil
}
