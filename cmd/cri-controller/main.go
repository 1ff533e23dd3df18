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
	kubeconfigHelp = "kubeconfig file; if empty, $KUBECONFIG, else the pod's service account"
	logLevelHelp   = "log level: error, warn, info, debug or trace"
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
		Use:           "cri-controller",
		Short:         "Restart containers, update images in place and pre-pull images, as custom resources request",
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
		"TCP port of the ops API on nodes; the annotation "+nodes.AddressAnnotation+" of a node overrides it")
	f.StringVar(&o.Identity, "identity", "",
		"where certificates come from: \"csr\", this controller signs those of nodes and its own; \"files\", "+
			"--tls-cert-file has the controller's; if empty, files with --tls-cert-file, else csr")
	f.StringVar(&o.Namespace, "identity-namespace", "",
		"with csr: namespace of Secret "+authority.SecretName+" and ConfigMap "+identity.BundleName+
			"; if empty, the pod's")
	f.DurationVar(&o.Lives.Life, "certificate-life", 72*time.Hour,
		"with csr: lifetime of certificates of nodes and of the controller; nodes renew theirs after 70 to 80 % of it")
	f.DurationVar(&o.Lives.CALife, "ca-life", 365*24*time.Hour,
		"with csr: lifetime of the CA; after 70 % of it the controller makes the next CA")
	f.StringVar(&o.Files.Cert, "tls-cert-file", "",
		"with files: PEM file with the certificate that the controller shows to nodes; read again when it changes")
	f.StringVar(&o.Files.Key, "tls-key-file", "", "with files: PEM file with the key of that certificate")
	f.StringVar(&o.Files.CA, "tls-ca-file", "",
		"with files: PEM file with the CAs that must have signed node certificates")
	f.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8080",
		"address of the metrics endpoint; 0 disables it")
	f.StringVar(&o.ProbeAddress, "health-probe-bind-address", ":8081",
		"address of /healthz and /readyz; 0 disables them")
	f.BoolVar(&o.LeaderElect, "leader-elect", false,
		"work only while this replica holds the Lease "+controller.LeaseName+", so that several replicas can run")
	f.StringVar(&o.LeaderNamespace, "leader-election-namespace", "",
		"namespace of that Lease; if empty, the pod's")
	f.StringVar(&s.logLevel, "log-level", "info", logLevelHelp)
	f.StringVar(&s.format, "log-format", "text", "log format: text or json")
	f.IntVar(&o.Workers, "workers", 8, "number of objects of each kind to reconcile at the same time")
	f.DurationVar(&o.NodeConditionPeriod, "node-condition-period", nodecondition.DefaultEvery,
		"how often to ask each node whether cri-proxy is bypassed, for the Node condition "+
			string(nodes.BypassedCondition))
	f.DurationVar(&o.Pins.PinFor, "image-pin-max", 7*24*time.Hour,
		"maximum time for which an ImagePullJob may pin its image; 0 means 744h, the maximum of a node")
	f.Int32Var(&o.Pins.PinPercent, "image-pin-percent", 40,
		"maximum share of a node's image file system, in percent, that the pins of all ImagePullJobs together "+
			"may take; 0 means no limit")
	f.DurationVar(&o.OpenKruisePeriod, "openkruise-period", kruise.Every,
		"how often to check whether OpenKruise is in the cluster; if it is, its kinds are left to it")
	f.IntVar(&o.Webhooks.Port, "webhook-port", 0, "TCP port of the admission webhooks; 0 disables them")
	f.StringVar(&o.Webhooks.CertDir, "webhook-cert-dir", "",
		"directory with tls.crt and tls.key of the webhooks, read again when they change; if empty, the "+
			"controller makes and renews a certificate, keeps it in Secret "+servingcert.Secret+
			", and writes its CA into the webhook configurations")
	f.StringVar(&o.Webhooks.Namespace, "webhook-namespace", "",
		"namespace of that Secret and of Service "+servingcert.Service+"; if empty, the pod's")
	f.DurationVar(&o.Webhooks.Validity, "webhook-cert-validity", servingcert.DefaultValidity,
		"validity of a certificate that the controller makes; it is renewed after two thirds of that")
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
