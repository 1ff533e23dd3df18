// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"

	"github.com/sirupsen/logrus"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/finalizers"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/podready"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// setUpKruise adds the controllers of OpenKruise's kinds, for as long as OpenKruise is not in the
// cluster.
func (w *wiring) setUpKruise(context.Context) error {
	m := w.manager
	direct, err := directClient(m)
	if err != nil {
		return err
	}
	w.lookout = &kruise.Lookout{Reader: direct, Mapper: m.GetRESTMapper(), Every: w.OpenKruisePeriod, Log: w.log}
	gate := &kruise.Gate{}
	group := &kruise.Group{
		Lookout: w.lookout, Gate: gate, Log: w.log,
		SetUp: func(ctx context.Context) error {
			if err := w.setUpRecreate(ctx, gate); err != nil {
				return err
			}
			return w.setUpImagePull(ctx, gate)
		},
		HandOver: func(ctx context.Context) error {
			// Only what is ours: whoever ends a request puts its pod back into service.
			requests, err1 := finalizers.TakeOff(ctx, direct, m.GetRESTMapper(), finalizers.Requests, accept.Finalizer)
			jobs, err2 := finalizers.TakeOff(ctx, direct, m.GetRESTMapper(), finalizers.PullJobs, v1beta1.PullFinalizer)
			if requests+jobs > 0 {
				w.log.WithFields(logrus.Fields{"requests": requests, "jobs": jobs}).
					Info("left to OpenKruise what had been begun")
			}
			return errors.Join(err1, err2)
		},
	}
	w.probes.Note("OpenKruise", w.lookout.Note)
	return errors.Join(m.Add(w.lookout), m.Add(group))
}

// setUpPodReady adds what opens the gates KruisePodReady, for as long as OpenKruise is not in the
// cluster. It needs no custom resources: pods come into service while their definitions are being
// replaced.
func (w *wiring) setUpPodReady(context.Context) error {
	m := w.manager
	gate := &kruise.Gate{}
	return m.Add(&kruise.Group{
		Lookout: w.lookout, Gate: gate, Log: w.log, Kindless: true,
		SetUp: func(context.Context) error {
			r := &podready.Reconciler{
				Client: m.GetClient(), APIReader: m.GetAPIReader(), Recorder: m.GetEventRecorder(recorderName),
				Wrote: w.requests.Wrote, Log: w.log, Gate: gate,
			}
			return r.SetupWithManager(m, w.Workers)
		},
	})
}

// directClient returns a client that reads past the cache, and keeps none.
func directClient(m ctrl.Manager) (client.Client, error) {
	return client.New(m.GetConfig(), client.Options{
		Scheme: m.GetScheme(), Mapper: m.GetRESTMapper(), HTTPClient: m.GetHTTPClient(),
	})
}
