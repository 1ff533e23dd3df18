// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package finalizers removes finalizers from objects on which the controller no longer works.
package finalizers

import (
	"context"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// pageSize is how many objects one answer of the API server has: a large cluster may have many.
const pageSize = 500

// TakeOff removes finalizers from all objects of a kind, in whichever version the API server serves
// it, and returns how many objects had one. A kind that is not served has no objects. c must read
// past the cache.
func TakeOff(
	ctx context.Context, c client.Client, mapper meta.RESTMapper, kind schema.GroupKind, names ...string,
) (int, error) {
	mapping, err := mapper.RESTMapping(kind)
	if meta.IsNoMatchError(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	had := 0
	list := &metav1.PartialObjectMetadataList{}
	for {
		list.SetGroupVersionKind(mapping.GroupVersionKind)
		if err := c.List(ctx, list, client.Limit(pageSize), client.Continue(list.Continue)); err != nil {
			return had, fmt.Errorf("list %s: %w", mapping.Resource.Resource, err)
		}
		for i := range list.Items {
			o := &list.Items[i]
			if !hasOne(o, names) {
				continue
			}
			o.SetGroupVersionKind(mapping.GroupVersionKind)
			if err := takeOff(ctx, c, o, names); err != nil {
				return had, fmt.Errorf("%s %s: take off the finalizer: %w", kind.Kind, client.ObjectKeyFromObject(o),
					err)
			}
			had++
		}
		if list.Continue == "" {
			return had, nil
		}
	}
}

func hasOne(o client.Object, names []string) bool {
	return slices.ContainsFunc(o.GetFinalizers(), func(f string) bool { return slices.Contains(names, f) })
}

func takeOff(ctx context.Context, c client.Client, o *metav1.PartialObjectMetadata, names []string) error {
	first := true
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		if !first {
			if err := c.Get(ctx, client.ObjectKeyFromObject(o), o); err != nil {
				return err
			}
		}
		first = false
		if !hasOne(o, names) {
			return nil
		}
		before := o.DeepCopy()
		o.Finalizers = slices.DeleteFunc(o.Finalizers, func(f string) bool { return slices.Contains(names, f) })
		return c.Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	})
	return client.IgnoreNotFound(err)
}
