// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

type metrics struct {
	results *prometheus.CounterVec
	phases  *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, e *Engine) (*metrics, error) {
	m := &metrics{
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_operations_total", Help: "Finished operations by kind and result.",
		}, []string{"kind", "result"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "criproxy_operation_phase_duration_seconds",
			Help:    "How long finished operations have been in a phase, by kind and phase.",
			Buckets: []float64{.005, .02, .1, .5, 1, 5, 10, 30, 60, 300, 1800},
		}, []string{"kind", "phase"}),
	}
	e.node.Metrics = swap.Metrics{
		Gap: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "criproxy_operation_gap_seconds",
			Help: "From the exit of a container to the start of its successor, by kind of operation and method; " +
				"0 where they overlap.",
			Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 5, 30},
		}, []string{"kind", "method"}),
		GateFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_gate_failures_total", Help: "Restarts that were to use a gate and went on without.",
		}),
	}
	if reg == nil {
		return m, nil
	}
	recorded := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_recorded_containers", Help: "Containers whose creation was recorded.",
	}, func() float64 { return float64(e.node.Records.Len()) })
	journal := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_journal_open", Help: "1 while operations can be written down; otherwise they are refused.",
	}, func() float64 {
		if e.disk.Journal.IsOpen() {
			return 1
		}
		return 0
	})
	overrides := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_image_overrides", Help: "Containers whose image is not the one in the pod's spec.",
	}, func() float64 { return float64(e.node.Overrides.Len()) })
	for _, c := range []prometheus.Collector{
		m.results, m.phases, e.node.Metrics.Gap, e.node.Metrics.GateFailures, &activeOperations{e}, recorded, journal,
		overrides, e.node.Overrides.Lost(),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

// activeOperations counts the operations that have not finished.
type activeOperations struct{ e *Engine }

var activeDesc = prometheus.NewDesc(
	"criproxy_operations_active", "Operations that have not finished, by kind and phase.",
	[]string{"kind", "phase"}, nil,
)

// Describe implements [prometheus.Collector].
func (*activeOperations) Describe(c chan<- *prometheus.Desc) { c <- activeDesc }

// Collect implements [prometheus.Collector]. Phases that no operation is in have no series, but
// each kind has one.
func (a *activeOperations) Collect(c chan<- prometheus.Metric) {
	type key struct{ kind, phase string }
	pending := operation.PhaseName(opsv1.Phase_PHASE_PENDING)
	counts := map[key]int{{opsv1.KindRestart, pending}: 0, {opsv1.KindUpgrade, pending}: 0}
	for _, o := range a.e.node.Active() {
		counts[key{o.Kind(), operation.PhaseName(o.Phase())}]++
	}
	for k, n := range counts {
		c <- prometheus.MustNewConstMetric(activeDesc, prometheus.GaugeValue, float64(n), k.kind, k.phase)
	}
}

// finished counts an operation that has finished. It has been in the phases of stays, the last of
// which is its end.
func (m *metrics) finished(op *opsv1.Operation, stays []operation.Stay) {
	results := map[opsv1.Phase]string{
		opsv1.Phase_PHASE_SUCCEEDED: "succeeded", opsv1.Phase_PHASE_CANCELLED: "cancelled",
	}
	result := results[op.GetPhase()]
	if result == "" {
		result = "failed"
	}
	m.results.WithLabelValues(op.GetKind(), result).Inc()
	for i := range len(stays) - 1 {
		stayed := stays[i+1].Since.Sub(stays[i].Since)
		m.phases.WithLabelValues(op.GetKind(), operation.PhaseName(stays[i].Phase)).Observe(stayed.Seconds())
	}
}
