// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/connectivity"
)

var _ prometheus.Collector = (*GRPCNodes)(nil)

var connectionsDesc = prometheus.NewDesc("criproxy_controller_node_connections",
	"Connections to nodes, by state: ready, connecting, failing (tried again until nobody wants the node any more), idle.", []string{"state"}, nil)

// Describe implements [prometheus.Collector].
func (g *GRPCNodes) Describe(c chan<- *prometheus.Desc) { c <- connectionsDesc }

// Collect implements [prometheus.Collector].
func (g *GRPCNodes) Collect(c chan<- prometheus.Metric) {
	counts := map[string]int{"ready": 0, "connecting": 0, "failing": 0, "idle": 0}
	g.mu.Lock()
	for _, n := range g.conns {
		switch s := n.conn.GetState(); s {
		case connectivity.TransientFailure:
			counts["failing"]++
		case connectivity.Shutdown:
		default:
			counts[strings.ToLower(s.String())]++
		}
	}
	g.mu.Unlock()
	for state, n := range counts {
		c <- prometheus.MustNewConstMetric(connectionsDesc, prometheus.GaugeValue, float64(n), state)
	}
}
