// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package notice

import "github.com/prometheus/client_golang/prometheus"

// Metrics of rollouts, all named criproxy_controller_rollout*. A nil *Metrics counts nothing.
type Metrics struct {
	rollouts *prometheus.CounterVec
	pods     *prometheus.CounterVec
	writes   *prometheus.CounterVec
	working  prometheus.Gauge
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		rollouts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_rollouts_completed_total",
			Help: "InPlaceRollouts that have ended, by reason of the condition Complete.",
		}, []string{"reason"}),
		pods: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_rollout_pods_failed_total",
			Help: "Pods that failed in a rollout, by reason.",
		}, []string{"reason"}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_rollout_api_writes_total",
			Help: "Writes to the API server for rollouts other than events, by what was written.",
		}, []string{"object"}),
	}
	m.working = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "criproxy_controller_rollout_conversations_active",
		Help: "Conversations with nodes, and waits for them, that are under way for rollouts.",
	})
	for _, c := range []prometheus.Collector{m.working, m.rollouts, m.pods, m.writes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Completed counts a rollout that has ended.
func (m *Metrics) Completed(reason string) {
	if m != nil {
		m.rollouts.WithLabelValues(reason).Inc()
	}
}

// Pod counts a pod that has failed.
func (m *Metrics) Pod(reason string) {
	if m != nil {
		m.pods.WithLabelValues(reason).Inc()
	}
}

// Wrote counts a write to the API server.
func (m *Metrics) Wrote(object string) {
	if m != nil {
		m.writes.WithLabelValues(object).Inc()
	}
}

// Following counts operations on nodes that are followed, by +1 and -1.
func (m *Metrics) Following(n int) {
	if m != nil {
		m.working.Add(float64(n))
	}
}

// Workers counts the goroutines that wait for nodes.
func (m *Metrics) Workers() prometheus.Gauge {
	if m == nil {
		return nil
	}
	return m.working
}
