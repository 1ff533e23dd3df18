// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/controller/admission/servingcert"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// minValidity is the shortest validity of a certificate: replicas take some ten seconds to change over to another.
const minValidity = time.Minute

// webhookSettings are the flags of the webhooks.
type webhookSettings struct {
	port      int
	certDir   string
	namespace string
	validity  time.Duration
}

func (s *webhookSettings) flags(f *pflag.FlagSet) {
	f.IntVar(&s.port, "webhook-port", 0, "TCP port of the admission webhooks; 0 switches them off")
	f.StringVar(&s.certDir, "webhook-cert-dir", "", "directory with tls.crt and tls.key for the webhooks, read again when they change; empty means that a certificate is made and renewed here, kept in the Secret "+servingcert.Secret+" and its CA put into the webhook configurations")
	f.StringVar(&s.namespace, "webhook-namespace", "", "namespace of that Secret and of the Service "+servingcert.Service+"; empty means the pod's own")
	f.DurationVar(&s.validity, "webhook-cert-validity", servingcert.DefaultValidity, "how long a certificate made here is valid; it is renewed when two thirds of that have passed")
}

// complete checks the flags and fills in what they leave out.
func (s *webhookSettings) complete() error {
	switch {
	case s.port < 0 || s.port > 65535:
		return fmt.Errorf("--webhook-port must be between 0, which switches the webhooks off, and 65535, not %d", s.port)
	case s.port == 0 || s.certDir != "":
		return nil
	case s.validity < minValidity:
		return fmt.Errorf("--webhook-cert-validity must be at least %s, not %s", minValidity, s.validity)
	case s.namespace != "":
		return nil
	}
	text, err := os.ReadFile(namespaceFile)
	if err != nil {
		return fmt.Errorf("give --webhook-namespace outside a pod: %w", err)
	}
	s.namespace = strings.TrimSpace(string(text))
	return nil
}

// server is what the webhooks are served by, nil when they are off, and what keeps its certificate, nil when that comes from files.
func (s *webhookSettings) server(o *cache.Options, log logrus.FieldLogger) (webhook.Server, *servingcert.Keeper) {
	if s.port == 0 {
		return nil, nil
	}
	options := webhook.Options{Port: s.port, CertDir: s.certDir}
	if s.certDir != "" {
		return webhook.NewServer(options), nil
	}
	keeper := &servingcert.Keeper{Namespace: s.namespace, Validity: s.validity, Log: log}
	servingcert.CacheOptions(o, s.namespace)
	options.TLSOpts = []func(*tls.Config){func(c *tls.Config) { c.GetCertificate = keeper.GetCertificate }}
	return webhook.NewServer(options), keeper
}

// setUpWebhooks adds the webhooks. All replicas serve them, and are ready only when they do.
func setUpWebhooks(m ctrl.Manager, keeper *servingcert.Keeper, probes *health, lookout *kruise.Lookout, log logrus.FieldLogger) error {
	server := m.GetWebhookServer()
	admission.Register(admission.Aside(server, lookout.There), m.GetScheme(), m.GetAPIReader(), log)
	probes.check("webhook", server.StartedChecker())
	if keeper == nil {
		return nil
	}
	probes.check("webhook-certificate", keeper.Ready)
	direct, err := directClient(m)
	if err != nil {
		return err
	}
	keeper.Client = direct
	return keeper.SetupWithManager(m)
}
