// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"crypto/tls"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/controller/admission/servingcert"
)

// minValidity is the shortest validity of a certificate: replicas take some ten seconds to change
// over to another.
const minValidity = time.Minute

// WebhookOptions say how to serve the admission webhooks.
type WebhookOptions struct {
	// Port is the TCP port; 0 switches the webhooks off.
	Port int
	// CertDir has tls.crt and tls.key. Empty means that the controller makes and renews a
	// certificate.
	CertDir string
	// Namespace is where that certificate is kept. Empty means the pod's own.
	Namespace string
	// Validity is how long that certificate is valid.
	Validity time.Duration
}

// complete checks the options, and fills in what they leave out.
func (o *WebhookOptions) complete() error {
	switch {
	case o.Port < 0 || o.Port > 65535:
		return fmt.Errorf("--webhook-port must be between 0, which switches the webhooks off, and 65535, not %d",
			o.Port)
	case o.Port == 0 || o.CertDir != "":
		return nil
	case o.Validity < minValidity:
		return fmt.Errorf("--webhook-cert-validity must be at least %s, not %s", minValidity, o.Validity)
	case o.Namespace != "":
		return nil
	}
	namespace, err := PodNamespace()
	if err != nil {
		return fmt.Errorf("give --webhook-namespace outside a pod: %w", err)
	}
	o.Namespace = namespace
	return nil
}

// server returns what serves the webhooks, nil when they are off, and what keeps its certificate,
// nil when that comes from files.
func (o *WebhookOptions) server(cached *cache.Options, log logrus.FieldLogger) (webhook.Server, *servingcert.Keeper) {
	if o.Port == 0 {
		return nil, nil
	}
	options := webhook.Options{Port: o.Port, CertDir: o.CertDir}
	if o.CertDir != "" {
		return webhook.NewServer(options), nil
	}
	keeper := &servingcert.Keeper{Namespace: o.Namespace, Validity: o.Validity, Log: log}
	servingcert.CacheOptions(cached, o.Namespace)
	options.TLSOpts = []func(*tls.Config){func(c *tls.Config) { c.GetCertificate = keeper.GetCertificate }}
	return webhook.NewServer(options), keeper
}

// setUpWebhooks adds the webhooks. All replicas serve them, and are ready only when they do.
func (w *wiring) setUpWebhooks(keeper *servingcert.Keeper) error {
	m := w.manager
	server := m.GetWebhookServer()
	admission.Register(admission.Aside(server, w.lookout.There), m.GetScheme(), m.GetAPIReader(), w.log)
	w.probes.Check("webhook", server.StartedChecker())
	if keeper == nil {
		return nil
	}
	w.probes.Check("webhook-certificate", keeper.Ready)
	direct, err := directClient(m)
	if err != nil {
		return err
	}
	keeper.Client = direct
	return keeper.SetupWithManager(m)
}
