// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
)

// Metrics count the commands to nodes. A nil *Metrics counts nothing.
type Metrics struct {
	calls *prometheus.CounterVec
	time  *prometheus.HistogramVec
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "criproxy_controller_node_calls_total",
			Help: "Commands sent to nodes, by method and gRPC code.",
		}, []string{"method", "code"}),
		time: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "criproxy_controller_node_call_duration_seconds",
			Help:    "Time a unary command to a node took.",
			Buckets: prometheus.ExponentialBuckets(.001, 2.5, 10),
		}, []string{"method"}),
	}
	for _, c := range []prometheus.Collector{m.calls, m.time} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// called counts one call. A stream has no duration.
func (m *Metrics) called(method string, code codes.Code, d time.Duration) {
	if m == nil {
		return
	}
	m.calls.WithLabelValues(method, code.String()).Inc()
	if d > 0 {
		m.time.WithLabelValues(method).Observe(d.Seconds())
	}
}

var _ prometheus.Collector = (*Client)(nil)

var connectionsDesc = prometheus.NewDesc("criproxy_controller_node_connections",
	"Connections to nodes, by state: ready, connecting, failing (tried again until nobody wants the node "+
		"any more), idle.",
	[]string{"state"}, nil)

// Describe implements [prometheus.Collector].
func (c *Client) Describe(descs chan<- *prometheus.Desc) { descs <- connectionsDesc }

// Collect implements [prometheus.Collector].
func (c *Client) Collect(metrics chan<- prometheus.Metric) {
	counts := map[string]int{"ready": 0, "connecting": 0, "failing": 0, "idle": 0}
	c.mu.Lock()
	for _, n := range c.conns {
		switch s := n.conn.GetState(); s {
		case connectivity.TransientFailure:
			counts["failing"]++
		case connectivity.Shutdown:
		default:
			counts[strings.ToLower(s.String())]++
		}
	}
	c.mu.Unlock()
	for state, n := range counts {
		metrics <- prometheus.MustNewConstMetric(connectionsDesc, prometheus.GaugeValue, float64(n), state)
	}
}
