// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

type metrics struct {
	results *prometheus.CounterVec
	bytes   prometheus.Counter
	yields  prometheus.Counter
	seconds prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, p *Puller) (*metrics, error) {
	m := &metrics{
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_pulls_total", Help: "Finished pulls ahead of time by result and reason.",
		}, []string{"result", "reason"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_pull_bytes_total",
			Help: "Compressed bytes of layers that came to the node by pulls ahead of time.",
		}),
		yields: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_pull_yields_total",
			Help: "Times that a pull ahead of time was cut off for one of kubelet's.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "criproxy_pull_seconds", Help: "From the first attempt to the end of pulls that fetched something.",
			Buckets: []float64{.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600},
		}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.results, m.bytes, m.yields, m.seconds,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "criproxy_pulls_active", Help: "Pulls ahead of time that have not finished.",
		}, func() float64 { return float64(len(p.list(true))) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "criproxy_pinned_images", Help: "Pins of images, by whomever.",
		}, func() float64 { return float64(len(p.pins.List())) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) finished(op *opsv1.PullOperation) {
	result := "failed"
	switch op.GetPhase() {
	case opsv1.PullPhase_PULL_SUCCEEDED:
		result = "succeeded"
	case opsv1.PullPhase_PULL_CANCELLED:
		result = "cancelled"
	}
	m.results.WithLabelValues(result, op.GetReason()).Inc()
	if op.GetStartTime() != nil && op.GetReason() != opsv1.PullReasonPresent {
		m.seconds.Observe(op.GetFinishTime().AsTime().Sub(op.GetStartTime().AsTime()).Seconds())
	}
}
