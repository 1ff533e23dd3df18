// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodecondition

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// The states of nodes, as label values.
const (
	stateInPath   = "in_path"
	stateBypassed = "bypassed"
	stateSilent   = "silent" // had cri-proxy, and does not answer
	stateNone     = "none"   // has never answered
)

// Metrics count nodes. A nil *Metrics counts nothing.
type Metrics struct {
	writes prometheus.Counter
	nodes  *prometheus.GaugeVec

	mu sync.Mutex // guards states
	// states is the state of each node.
	states map[string]string
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		writes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_controller_node_condition_writes_total",
			Help: "Writes of the condition CRIProxyBypassed to the API server.",
		}),
		nodes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "criproxy_controller_nodes",
			Help: "Nodes, by what is known of their cri-proxy: in_path, bypassed, silent (it does not answer any " +
				"more), " +
				"none (it never has).",
		}, []string{"state"}),
		states: map[string]string{},
	}
	for _, state := range []string{stateInPath, stateBypassed, stateSilent, stateNone} {
		m.nodes.WithLabelValues(state)
	}
	for _, c := range []prometheus.Collector{m.writes, m.nodes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *Metrics) wrote() {
	if m != nil {
		m.writes.Inc()
	}
}

// is notes the state of a node; "" if the node is gone.
func (m *Metrics) is(name, state string) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.states[name]
	if before == state {
		return
	}
	if before != "" {
		m.nodes.WithLabelValues(before).Dec()
	}
	if state == "" {
		delete(m.states, name)
		return
	}
	m.states[name] = state
	m.nodes.WithLabelValues(state).Inc()
}
