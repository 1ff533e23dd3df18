// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics of the authority, all named criproxy_controller_*. A nil *Metrics counts nothing.
type Metrics struct {
	requests *prometheus.CounterVec
	ca, own  prometheus.Gauge
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_certificate_requests_total",
			Help: "CertificateSigningRequests of nodes decided on, by result: Signed, or the reason of the refusal.",
		}, []string{"result"}),
		ca: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "criproxy_controller_ca_expiry_timestamp_seconds",
			Help: "When the CA that signs node certificates ends, in seconds since 1970; 0 where this replica does " +
				"not lead.",
		}),
		own: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "criproxy_controller_certificate_expiry_timestamp_seconds",
			Help: "When the controller's own certificate ends, in seconds since 1970; 0 where this replica does " +
				"not lead.",
		}),
	}
	for _, c := range []prometheus.Collector{m.requests, m.ca, m.own} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *Metrics) request(result string) {
	if m != nil {
		m.requests.WithLabelValues(result).Inc()
	}
}

func (m *Metrics) times(ca, own time.Time) {
	if m != nil {
		m.ca.Set(float64(ca.Unix()))
		m.own.Set(float64(own.Unix()))
	}
}
