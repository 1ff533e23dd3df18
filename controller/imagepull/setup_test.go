// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"io"
	"testing"

	"github.com/sirupsen/logrus"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	apischeme "github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	joblist "github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	"github.com/cri-proxy/cri-proxy/controller/logadapter"
)

func TestSetup(t *testing.T) {
	scheme, err := apischeme.New()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := ctrl.NewManager(&rest.Config{Host: "http://127.0.0.1:1"}, ctrl.Options{
		Scheme: scheme, Logger: logadapter.New(log), Metrics: metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0",
		Controller:             config.Controller{SkipNameValidation: new(true)}, // for -count
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &imagepull.Reconciler{Client: m.GetClient(), Nodes: newFleet(), Log: log}
	if err := r.SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
	if err := (&joblist.Reconciler{Client: m.GetClient(), Log: log}).SetupWithManager(t.Context(), m, 1); err != nil {
		t.Error(err)
	}
}
