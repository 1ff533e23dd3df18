// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics count requests. A nil *Metrics counts nothing.
type Metrics struct {
	requests   *prometheus.CounterVec
	duration   prometheus.Histogram
	containers *prometheus.CounterVec
	watches    prometheus.Gauge
	writes     *prometheus.CounterVec
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_requests_completed_total",
			Help: "ContainerRecreateRequests completed, by whether all their containers succeeded.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "criproxy_controller_request_duration_seconds",
			Help:    "Time from creation to completion of a ContainerRecreateRequest.",
			Buckets: []float64{.25, .5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 900},
		}),
		containers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_containers_total",
			Help: "Containers of completed ContainerRecreateRequests, by phase.",
		}, []string{"phase"}),
		watches: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "criproxy_controller_operation_watches",
			Help: "Node operations being watched.",
		}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_api_writes_total",
			Help: "Writes to the API server other than events, by what was written.",
		}, []string{"object"}),
	}
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.containers, m.watches, m.writes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *Metrics) watching(n int) {
	if m != nil {
		m.watches.Add(float64(n))
	}
}

// Wrote counts a write to the API server, by what was written.
func (m *Metrics) Wrote(object string) {
	if m != nil {
		m.writes.WithLabelValues(object).Inc()
	}
}

// completed counts a request that has completed at an age, with the phases of its containers.
func (m *Metrics) completed(age time.Duration, phases []string, ok bool) {
	if m == nil {
		return
	}
	result := "succeeded"
	if !ok {
		result = "failed"
	}
	m.requests.WithLabelValues(result).Inc()
	m.duration.Observe(age.Seconds())
	for _, p := range phases {
		m.containers.WithLabelValues(p).Inc()
	}
}
