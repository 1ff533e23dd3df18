// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/test/metricdoc"
)

// docs/METRICS.md has what a node really shows, no more and no less.
func TestMetricsAreDocumented(t *testing.T) {
	c := newConfig(t)
	startRuntime(t, runtimePath(c))
	c.Ops.Address, c.Ops.Enrol.Kubeconfig = "127.0.0.1:0", "/nonexistent" // with the metrics of enrolment
	n, err := newNode(c, c.Listen.Path, logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	if err := n.identify(); err != nil {
		t.Fatal(err)
	}
	if err := n.openState(t.Context(), view.State{}); err != nil {
		t.Fatal(err)
	}
	n.registry.MustRegister(&drains{here: func() int { return -1 }})
	n.commands.calls.WithLabelValues("admin", "NodeInfo", "OK").Inc()
	metricdoc.Compare(t, metricdoc.Read(t, "../../docs/METRICS.md", "Node"), "criproxy_", n.registry,
		n.state.Load().registry)
}
