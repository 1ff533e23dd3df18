// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"time"

	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/finalizers"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

var (
	requestKind = schema.GroupKind{Group: appsv1alpha1.GroupVersion.Group, Kind: "ContainerRecreateRequest"}
	rolloutKind = schema.GroupKind{Group: inplace.GroupVersion.Group, Kind: "InPlaceRollout"}
	jobKind     = schema.GroupKind{Group: v1beta1.GroupVersion.Group, Kind: "ImagePullJob"}
)

// setUpKruise adds the controllers of OpenKruise's kinds, by setUp, for as long as OpenKruise is not in the cluster.
func setUpKruise(m ctrl.Manager, every time.Duration, log logrus.FieldLogger, setUp func(context.Context, *kruise.Gate) error) (*kruise.Lookout, error) {
	direct, err := directClient(m)
	if err != nil {
		return nil, err
	}
	lookout := &kruise.Lookout{Reader: direct, Mapper: m.GetRESTMapper(), Every: every, Log: log}
	gate := &kruise.Gate{}
	group := &kruise.Group{
		Lookout: lookout, Gate: gate, Log: log,
		SetUp: func(ctx context.Context) error { return setUp(ctx, gate) },
		HandOver: func(ctx context.Context) error {
			// Only what is ours: a pod that was taken out of service is put back by whoever ends the request.
			requests, err1 := finalizers.TakeOff(ctx, direct, m.GetRESTMapper(), requestKind, controller.OperationFinalizer)
			jobs, err2 := finalizers.TakeOff(ctx, direct, m.GetRESTMapper(), jobKind, v1beta1.PullFinalizer)
			if requests+jobs > 0 {
				log.WithFields(logrus.Fields{"requests": requests, "jobs": jobs}).Info("left to OpenKruise what had been begun")
			}
			return errors.Join(err1, err2)
		},
	}
	return lookout, errors.Join(m.Add(lookout), m.Add(group))
}

// setUpPodReady adds what opens the gates KruisePodReady, for as long as OpenKruise is not in the cluster. It needs no custom resources:
// pods come into service while their definitions are being replaced.
func setUpPodReady(m ctrl.Manager, s settings, lookout *kruise.Lookout, counters *controller.Metrics, log logrus.FieldLogger) error {
	gate := &kruise.Gate{}
	return m.Add(&kruise.Group{
		Lookout: lookout, Gate: gate, Log: log, Kindless: true,
		SetUp: func(context.Context) error {
			r := &controller.PodReadyReconciler{
				Client: m.GetClient(), APIReader: m.GetAPIReader(), Recorder: m.GetEventRecorder("cri-controller"), Metrics: counters, Log: log, Gate: gate,
			}
			return r.SetupWithManager(m, s.workers)
		},
	})
}

// directClient reads past the cache, and keeps none.
func directClient(m ctrl.Manager) (client.Client, error) {
	return client.New(m.GetConfig(), client.Options{Scheme: m.GetScheme(), Mapper: m.GetRESTMapper(), HTTPClient: m.GetHTTPClient()})
}
