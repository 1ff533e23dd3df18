// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// unknownMethod stands for every method outside the CRI descriptors: callers
// choose the names, so they must not become label values.
const unknownMethod = "unknown"

// knownCodes is the number of codes gRPC defines; a backend may send others.
const knownCodes = int(codes.Unauthenticated) + 1

// metrics are the proxy's own. See docs of the names in newMetrics.
type metrics struct {
	calls  *prometheus.CounterVec
	added  prometheus.Histogram
	faults *prometheus.CounterVec
}

// methodMetrics keeps the counters of one method at hand: looking a counter up
// by labels costs more than the count.
type methodMetrics struct {
	label  string
	all    *metrics
	byCode [knownCodes]atomic.Pointer[prometheus.Counter]
}

// newMetrics makes the metrics and registers them; a registry that already has
// them keeps its own, which is logged.
func newMetrics(r prometheus.Registerer, s *Server, up *Upstream, log logrus.FieldLogger) *metrics {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_calls_total",
			Help: "CRI calls answered, by method (methods outside the CRI are \"unknown\") and gRPC code.",
		}, []string{"method", "code"}),
		added: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "criproxy_call_added_seconds",
			Help: "Time a unary call spent in the proxy's own code, upstream call and transport excluded.",
			// From a few µs on the pass path to the seconds a swap may hold a call.
			Buckets: []float64{5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 1e-1, 1, 10},
		}),
		faults: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_interceptor_faults_total",
			Help: "Interceptor errors and panics after which a call was passed through unchanged.",
		}, []string{"method"}),
	}
	if r == nil {
		return m
	}
	inFlight := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_calls_in_flight",
		Help: "CRI calls that are not answered yet, event streams included.",
	}, func() float64 { return float64(s.inflight.count()) })
	all := []prometheus.Collector{m.calls, m.added, m.faults, inFlight}
	for _, state := range []connectivity.State{
		connectivity.Idle, connectivity.Connecting, connectivity.Ready, connectivity.TransientFailure,
		connectivity.Shutdown,
	} {
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "criproxy_upstream_state",
			Help:        "1 for the state the connection to the runtime is in, 0 for the others.",
			ConstLabels: prometheus.Labels{"state": state.String()},
		}, func() float64 {
			if up.State() == state {
				return 1
			}
			return 0
		}))
	}
	for _, c := range all {
		if err := r.Register(c); err != nil {
			log.WithError(err).Warn("metric not registered")
		}
	}
	return m
}

func (m *metrics) method(label string) *methodMetrics {
	return &methodMetrics{label: label, all: m}
}

// done counts an answered call.
func (m *methodMetrics) done(code codes.Code) {
	if int(code) >= knownCodes {
		m.all.calls.WithLabelValues(m.label, "other").Inc()
		return
	}
	c := m.byCode[code].Load()
	if c == nil {
		made := m.all.calls.WithLabelValues(m.label, code.String())
		c = &made
		m.byCode[code].Store(c)
	}
	(*c).Inc()
}

func (m *methodMetrics) added(d time.Duration) { m.all.added.Observe(d.Seconds()) }

func (m *methodMetrics) fault() { m.all.faults.WithLabelValues(m.label).Inc() }
