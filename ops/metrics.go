// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

type metrics struct {
	results      *prometheus.CounterVec
	gap          *prometheus.HistogramVec
	gateFailures prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, e *Engine) (*metrics, error) {
	m := &metrics{
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_operations_total", Help: "Finished operations by kind and result.",
		}, []string{"kind", "result"}),
		gap: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "criproxy_restart_gap_seconds", Help: "From the exit of a container to the start of its successor, by method; 0 where they overlap.",
			Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 5, 30},
		}, []string{"method"}),
		gateFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_gate_failures_total", Help: "Restarts that were to use a gate and went on without.",
		}),
	}
	if reg == nil {
		return m, nil
	}
	active := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_operations_active", Help: "Operations that have not finished.",
	}, func() float64 { return float64(e.active()) })
	recorded := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_recorded_containers", Help: "Containers whose creation was recorded.",
	}, func() float64 { return float64(e.records.Len()) })
	overrides := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_image_overrides", Help: "Containers whose image is not the one in the pod's spec.",
	}, func() float64 { return float64(e.overrides.n.Load()) })
	for _, c := range []prometheus.Collector{m.results, m.gap, m.gateFailures, active, recorded, overrides, e.overrides.lost} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) finished(op *opsv1.Operation) {
	result := map[opsv1.Phase]string{opsv1.Phase_PHASE_SUCCEEDED: "succeeded", opsv1.Phase_PHASE_CANCELLED: "cancelled"}[op.GetPhase()]
	if result == "" {
		result = "failed"
	}
	m.results.WithLabelValues(op.GetKind(), result).Inc()
}
