// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m, err := NewMetrics(registry)
	if err != nil {
		t.Fatal(err)
	}
	m.completed(time.Second, []string{"Succeeded"}, true)
	m.Wrote("request")
	m.watching(1)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 5 {
		t.Errorf("%d metrics", len(families))
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "criproxy_controller_") {
			t.Errorf("metric %s", f.GetName())
		}
	}
	if _, err := NewMetrics(registry); err == nil {
		t.Error("registered twice without an error")
	}
}
