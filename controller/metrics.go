// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// Metrics of the controller, all named criproxy_controller_*. A nil *Metrics
// counts nothing.
type Metrics struct {
	completed  *prometheus.CounterVec
	duration   prometheus.Histogram
	containers *prometheus.CounterVec
	nodeCalls  *prometheus.CounterVec
	nodeTime   *prometheus.HistogramVec
	watches    prometheus.Gauge
	writes     *prometheus.CounterVec
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		completed: prometheus.NewCounterVec(prometheus.CounterOpts{
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
		nodeCalls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_node_calls_total",
			Help: "Commands sent to nodes, by method and gRPC code.",
		}, []string{"method", "code"}),
		nodeTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "criproxy_controller_node_call_duration_seconds",
			Help:    "Time a unary command to a node took.",
			Buckets: prometheus.ExponentialBuckets(.001, 2.5, 10),
		}, []string{"method"}),
		watches: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "criproxy_controller_operation_watches",
			Help: "Node operations being watched.",
		}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_api_writes_total",
			Help: "Writes to the API server other than events, by what was written.",
		}, []string{"object"}),
	}
	for _, c := range []prometheus.Collector{m.completed, m.duration, m.containers, m.nodeCalls, m.nodeTime, m.watches, m.writes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *Metrics) nodeCall(method string, code codes.Code, d time.Duration) {
	if m == nil {
		return
	}
	m.nodeCalls.WithLabelValues(method, code.String()).Inc()
	if d > 0 {
		m.nodeTime.WithLabelValues(method).Observe(d.Seconds())
	}
}

func (m *Metrics) watching(n int) {
	if m != nil {
		m.watches.Add(float64(n))
	}
}

func (m *Metrics) wrote(object string) {
	if m != nil {
		m.writes.WithLabelValues(object).Inc()
	}
}

func (m *Metrics) requestCompleted(age time.Duration, phases []string, ok bool) {
	if m == nil {
		return
	}
	result := "succeeded"
	if !ok {
		result = "failed"
	}
	m.completed.WithLabelValues(result).Inc()
	m.duration.Observe(age.Seconds())
	for _, p := range phases {
		m.containers.WithLabelValues(p).Inc()
	}
}
