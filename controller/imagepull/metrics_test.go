// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nodes.NewMetrics(registry); err != nil {
		t.Errorf("beside those of requests: %v", err)
	}
	m.pulled(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED, Reason: "Pulled", BytesFetched: 7},
		time.Second)
	m.pulled(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_CANCELLED, Reason: "Cancelled"}, time.Second)
	m.failed("NoProxy")
	m.pulling(1)
	m.completed("Succeeded")
	m.Wrote("job")
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "criproxy_controller_image_") {
			continue
		}
		for _, s := range f.GetMetric() {
			text := f.GetName()
			for _, l := range s.GetLabel() {
				text += " " + l.GetValue()
			}
			seen = append(seen, text)
		}
	}
	want := `criproxy_controller_image_api_writes_total job
criproxy_controller_image_conversations_active
criproxy_controller_image_jobs_completed_total Succeeded
criproxy_controller_image_pull_bytes_total
criproxy_controller_image_pull_duration_seconds
criproxy_controller_image_pulls_active
criproxy_controller_image_pulls_total Cancelled cancelled
criproxy_controller_image_pulls_total NoProxy failed
criproxy_controller_image_pulls_total Pulled succeeded`
	for i, text := range seen { // labels in the order of their values
		parts := strings.Fields(text)
		slices.Sort(parts[1:])
		seen[i] = strings.Join(parts, " ")
	}
	slices.Sort(seen)
	if got := strings.Join(seen, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
