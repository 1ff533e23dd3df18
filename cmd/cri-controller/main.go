// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/admission/servingcert"
	"github.com/cri-proxy/cri-proxy/controller/authority"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/logadapter"
	"github.com/cri-proxy/cri-proxy/controller/nodecondition"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

const (
	kubeconfigHelp = "kubeconfig file; empty means $KUBECONFIG, then the pod's service account"
	logLevelHelp   = "error, warn, info, debug or trace"
)

// settings are the flags that are no [controller.Options].
type settings struct {
	kubeconfig       string
	logLevel, format string
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
	var o controller.Options
	cmd := &cobra.Command{
		Use: "cri-controller",
		Short: "Restart containers in place, change their images in place and pre-pull images, " +
			"as custom resources say",
		Version:       version.Short(),
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return run(cmd.Context(), s, o, cmd.ErrOrStderr())
		},
	}
	cmd.SetVersionTemplate(fmt.Sprintf("cri-controller {{.Version}}, %s %s/%s\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH))
	f := cmd.Flags()
	f.StringVar(&s.kubeconfig, "kubeconfig", "", kubeconfigHelp)
	f.IntVar(&o.NodePort, "node-port", nodes.DefaultPort,
		"TCP port of cri-proxy's command interface on the nodes; a node's annotation "+nodes.AddressAnnotation+
			" overrides it")
	f.StringVar(&o.Identity, "identity", "",
		"csr: this controller is the authority of the nodes' certificates and of its own; files: it has one "+
			"from --tls-cert-file; empty means files if that is given, else csr")
	f.StringVar(&o.Namespace, "identity-namespace", "",
		"csr: namespace of Secret "+authority.SecretName+" and ConfigMap "+identity.BundleName+"; empty means "+
			"the pod's own")
	f.DurationVar(&o.Lives.Life, "certificate-life", 72*time.Hour,
		"csr: how long a node's certificate, and this controller's own, is good; nodes renew theirs at 70 to "+
			"80 %")
	f.DurationVar(&o.Lives.CALife, "ca-life", 365*24*time.Hour,
		"csr: how long the CA is good; the next one is made at 70 %")
	f.StringVar(&o.Files.Cert, "tls-cert-file", "",
		"files: PEM certificate this controller shows to nodes; read again when it changes")
	f.StringVar(&o.Files.Key, "tls-key-file", "", "files: PEM key of that certificate")
	f.StringVar(&o.Files.CA, "tls-ca-file", "", "files: PEM file with the CAs that node certificates must chain to")
	f.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8080",
		"address of the Prometheus metrics; 0 switches them off")
	f.StringVar(&o.ProbeAddress, "health-probe-bind-address", ":8081",
		"address of /healthz and /readyz; 0 switches them off")
	f.BoolVar(&o.LeaderElect, "leader-elect", false,
		"work only while holding the Lease "+controller.LeaseName+", so that several replicas can run")
	f.StringVar(&o.LeaderNamespace, "leader-election-namespace", "",
		"namespace of that Lease; empty means the pod's own")
	f.StringVar(&s.logLevel, "log-level", "info", logLevelHelp)
	f.StringVar(&s.format, "log-format", "text", "text or json")
	f.IntVar(&o.Workers, "workers", 8, "requests worked on at the same time")
	f.DurationVar(&o.NodeConditionPeriod, "node-condition-period", nodecondition.DefaultEvery,
		"how often a node is asked whether its cri-proxy is bypassed, for the condition "+
			string(nodes.BypassedCondition)+" on Nodes")
	f.DurationVar(&o.Pins.PinFor, "image-pin-max", 7*24*time.Hour,
		"the longest time for which an ImagePullJob keeps its image from kubelet's image garbage collection; 0 "+
			"means 744h, which is what nodes take")
	f.Int32Var(&o.Pins.PinPercent, "image-pin-percent", 40,
		"how much of a node's image file system the pins of all ImagePullJobs may hold together, in percent; 0 "+
			"means no bound")
	f.DurationVar(&o.OpenKruisePeriod, "openkruise-period", kruise.Every,
		"how often it is looked whether OpenKruise is in the cluster, which its kinds are left to then")
	f.IntVar(&o.Webhooks.Port, "webhook-port", 0, "TCP port of the admission webhooks; 0 switches them off")
	f.StringVar(&o.Webhooks.CertDir, "webhook-cert-dir", "",
		"directory with tls.crt and tls.key for the webhooks, read again when they change; empty means that a "+
			"certificate is made and renewed here, kept in the Secret "+servingcert.Secret+" and its CA put into "+
			"the webhook configurations")
	f.StringVar(&o.Webhooks.Namespace, "webhook-namespace", "",
		"namespace of that Secret and of the Service "+servingcert.Service+"; empty means the pod's own")
	f.DurationVar(&o.Webhooks.Validity, "webhook-cert-validity", servingcert.DefaultValidity,
		"how long a certificate made here is valid; it is renewed when two thirds of that have passed")
	cmd.AddCommand(uninstallCommand())
	return cmd
}

func run(ctx context.Context, s settings, o controller.Options, stderr io.Writer) error {
	log, err := newLog(s, stderr)
	if err != nil {
		return err
	}
	// Below the container's memory limit, with room for what is not on the heap. GOMEMLIMIT wins.
	// Without a memory limit there is none.
	if limit, err := memlimit.Set(memlimit.WithRatio(0.85)); err == nil && limit != math.MaxInt64 {
		log.WithField("bytes", limit).Debug("memory limit")
	}
	if err := o.Complete(); err != nil {
		return err
	}
	logr := logadapter.New(log)
	ctrllog.SetLogger(logr)
	klog.SetLogger(logr)
	config, err := restConfig(s.kubeconfig, "cri-controller/"+version.Short())
	if err != nil {
		return err
	}
	return controller.Run(ctx, config, o, log)
}

// restConfig prefers the flag, then $KUBECONFIG, then the pod's service account.
func restConfig(path, userAgent string) (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = path
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("no API server to talk to, give --kubeconfig outside a pod: %w", err)
	}
	// Without client-go's own limit of 5 calls a second and kind of object, for which rollouts and
	// webhooks would wait. The API server has its priorities.
	config.QPS = -1
	config.UserAgent = userAgent
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
