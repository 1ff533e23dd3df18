// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Metrics of image jobs, all named criproxy_controller_image_*. A nil *Metrics counts nothing.
type Metrics struct {
	pulls    *prometheus.CounterVec
	bytes    prometheus.Counter
	duration prometheus.Histogram
	active   prometheus.Gauge
	jobs     *prometheus.CounterVec
	writes   *prometheus.CounterVec
	working  prometheus.Gauge
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		pulls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_image_pulls_total",
			Help: "Pulls on nodes that have ended, by result (succeeded, failed, cancelled) and the node's reason.",
		}, []string{"result", "reason"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_controller_image_pull_bytes_total",
			Help: "Bytes that nodes fetched for pulls that have ended.",
		}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "criproxy_controller_image_pull_duration_seconds",
			Help:    "Time from the command to the end of a pull, on nodes that did not have the image.",
			Buckets: []float64{.25, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800, 3600},
		}),
		active: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "criproxy_controller_image_pulls_active",
			Help: "Nodes that pull for a job.",
		}),
		jobs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_image_jobs_completed_total",
			Help: "ImagePullJobs completed, by reason of the condition Complete.",
		}, []string{"reason"}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_image_api_writes_total",
			Help: "Writes to the API server for image jobs other than events, by what was written.",
		}, []string{"object"}),
	}
	m.working = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "criproxy_controller_image_conversations_active",
		Help: "Calls to nodes, and waits for them, that are under way for image jobs.",
	})
	for _, c := range []prometheus.Collector{m.working, m.pulls, m.bytes, m.duration, m.active, m.jobs, m.writes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// pulled counts a pull that has ended d after the command.
func (m *Metrics) pulled(op *opsv1.PullOperation, d time.Duration) {
	if m == nil {
		return
	}
	result := "failed"
	switch op.GetPhase() {
	case opsv1.PullPhase_PULL_SUCCEEDED:
		result = "succeeded"
		if op.GetReason() != opsv1.PullReasonPresent {
			m.duration.Observe(d.Seconds())
		}
	case opsv1.PullPhase_PULL_CANCELLED:
		result = "cancelled"
	}
	m.pulls.WithLabelValues(result, op.GetReason()).Inc()
	m.bytes.Add(float64(max(op.GetBytesFetched(), 0)))
}

// failed counts a node that could not be told to pull.
func (m *Metrics) failed(reason string) {
	if m != nil {
		m.pulls.WithLabelValues("failed", reason).Inc()
	}
}

// pulling counts nodes that pull, and the goroutines that call them.
func (m *Metrics) pulling(n int) {
	if m != nil {
		m.active.Add(float64(n))
		m.working.Add(float64(n))
	}
}

func (m *Metrics) completed(reason string) {
	if m != nil {
		m.jobs.WithLabelValues(reason).Inc()
	}
}

// Wrote counts a write to the API server.
func (m *Metrics) Wrote(object string) {
	if m != nil {
		m.writes.WithLabelValues(object).Inc()
	}
}

// workers counts the goroutines that call nodes.
func (m *Metrics) workers() prometheus.Gauge {
	if m == nil {
		return nil
	}
	return m.working
}
