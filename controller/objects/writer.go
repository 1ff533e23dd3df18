// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package objects

import (
	"context"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Freshness is the version of an object that a reconciler wrote last. What the cache has may be
// older, and is not worth looking at then. The zero Freshness takes all for fresh.
type Freshness struct{ written string }

// Wrote notes that o is what the API server has answered to a write.
func (f *Freshness) Wrote(o client.Object) { f.written = o.GetResourceVersion() }

// Stale says that the cache, which o is from, has not caught up with the last write.
func (f *Freshness) Stale(o client.Object) bool {
	order, err := resourceversion.CompareResourceVersion(o.GetResourceVersion(), f.written)
	return err == nil && order < 0
}

// Writer writes objects of one kind, unless somebody else wrote in between.
type Writer[T client.Object] struct {
	Client client.Client
	// Wrote is told of each write of o: what is Kind, or Kind and " status".
	Wrote func(what string, o T)
	Kind  string
}

// Patch writes how metadata and spec of o differ from before, if they do.
func (w *Writer[T]) Patch(ctx context.Context, o, before T) error {
	if apiequality.Semantic.DeepEqual(before, o) {
		return nil
	}
	if err := w.Client.Patch(ctx, o, lockedPatch(before)); err != nil {
		return err
	}
	w.Wrote(w.Kind, o)
	return nil
}

// PatchStatus writes how the status of o differs from before, if it does, and says whether it did.
func (w *Writer[T]) PatchStatus(ctx context.Context, o, before T) (wrote bool, err error) {
	if apiequality.Semantic.DeepEqual(before, o) {
		return false, nil
	}
	if err := w.Client.Status().Patch(ctx, o, lockedPatch(before)); err != nil {
		return false, err
	}
	w.Wrote(w.Kind+" status", o)
	return true, nil
}

func lockedPatch(before client.Object) client.Patch {
	return client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
}
