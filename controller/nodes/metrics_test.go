// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/test/fleet"
)

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := nodes.NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	ca := fleet.NewCA(t)
	node := fleet.Serve(t, ca.Issue("node-1"))
	c, err := nodes.New(ca.Issue("cri-controller"), m, logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.GetOperation(t.Context(), nodes.Node{Name: "node-1", Address: node.Address},
		"x"); !nodes.NotFound(err) {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 2 {
		t.Errorf("%d metrics", len(families))
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "criproxy_controller_") {
			t.Errorf("metric %s", f.GetName())
		}
	}
	if _, err := nodes.NewMetrics(registry); err == nil {
		t.Error("registered twice without an error")
	}
}
