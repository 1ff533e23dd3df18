// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cri-proxy/cri-proxy/controller/admission"
	"github.com/cri-proxy/cri-proxy/controller/authority"
	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	"github.com/cri-proxy/cri-proxy/controller/nodecondition"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/test/metricdoc"
)

// docs/METRICS.md has what the controller really shows, no more and no less.
func TestMetricsAreDocumented(t *testing.T) {
	r := prometheus.NewRegistry()
	for name, register := range map[string]func() error{
		"requests":  func() error { _, err := recreate.NewMetrics(r); return err },
		"calls":     func() error { _, err := nodes.NewMetrics(r); return err },
		"imagepull": func() error { _, err := imagepull.NewMetrics(r); return err },
		"condition": func() error { _, err := nodecondition.NewMetrics(r); return err },
		"rollout":   func() error { _, err := notice.NewMetrics(r); return err },
		"nodes":     func() error { return r.Register(&nodes.Client{}) },
		"authority": func() error { _, err := authority.NewMetrics(r); return err },
		"rights":    func() error { _, err := admission.NewRights(nil, nil, r); return err },
		"build":     func() error { return r.Register(buildMetric()) },
	} {
		if err := register(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	metricdoc.Compare(t, metricdoc.Read(t, "../docs/METRICS.md", "Controller"), "criproxy_", r)
}
