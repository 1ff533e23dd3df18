// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"slices"
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
)

// writer writes a rollout.
type writer struct {
	client  client.Client
	metrics *notice.Metrics
	rollout *inplace.InPlaceRollout
	work    *work
	now     time.Time
}

// removeFinalizer takes the finalizer off.
func (w *writer) removeFinalizer(ctx context.Context) error {
	before := w.rollout.DeepCopy()
	w.rollout.Finalizers = slices.DeleteFunc(w.rollout.Finalizers,
		func(f string) bool { return f == inplace.RolloutFinalizer })
	return w.patch(ctx, before)
}

// patch writes the change of metadata and spec since before, unless someone else wrote in between.
func (w *writer) patch(ctx context.Context, before *inplace.InPlaceRollout) error {
	if apiequality.Semantic.DeepEqual(before, w.rollout) {
		return nil
	}
	err := w.client.Patch(ctx, w.rollout, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err == nil {
		w.wrote("rollout")
	}
	return err
}

// status writes next if it differs.
func (w *writer) status(ctx context.Context, next *inplace.InPlaceRolloutStatus) error {
	tellReady(next)
	if apiequality.Semantic.DeepEqual(&w.rollout.Status, next) {
		return nil
	}
	before := w.rollout.DeepCopy()
	w.rollout.Status = *next
	if err := w.client.Status().Patch(ctx, w.rollout, client.MergeFromWithOptions(before,
		client.MergeFromWithOptimisticLock{})); err != nil {
		return err
	}
	w.work.lastWrite = w.now
	w.wrote("rollout status")
	return nil
}

func (w *writer) wrote(object string) {
	w.metrics.Wrote(object)
	w.work.written = nodeops.VersionOf(w.rollout.ResourceVersion)
}
