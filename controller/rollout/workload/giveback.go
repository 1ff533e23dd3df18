// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
)

// fieldOwner is the field manager of what rollouts write into workloads.
const fieldOwner = "cri-controller"

// GiveBack gives up the controller's ownership of the fields that it has written into the workload.
// A rollout that has ended does not need them, and the API server would refuse a server-side apply
// of the workload's user because of them. Errors do not hold up the end of the rollout, except a
// conflict with another write.
func (e *Env) GiveBack(ctx context.Context, t *Target) error {
	if t == nil || t.Workload == nil {
		return nil
	}
	o, ok := t.Workload.Object().DeepCopyObject().(client.Object)
	if !ok {
		return nil // never
	}
	err := e.Live.Get(ctx, client.ObjectKeyFromObject(o), o) // the cache has no managed fields
	if apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		e.keeps(t, err)
		return nil
	}
	patch, err := disown(o)
	if patch == nil || err != nil {
		return err
	}
	err = e.Client.Patch(ctx, o, client.RawPatch(types.JSONPatchType, patch), client.FieldOwner(fieldOwner))
	switch {
	case err == nil:
		e.Wrote(e.Rollout.Spec.Target.WorkloadRef.Kind)
	case !apierrors.IsConflict(err):
		e.keeps(t, err)
		err = nil
	}
	return err
}

// keeps tells people that the controller still owns the fields.
func (e *Env) keeps(t *Target, err error) {
	text := fmt.Sprintf("field manager %s still owns what the rollout has written into %s, and a server-side apply "+
		"of that needs --force-conflicts: it cannot be given back: %s", fieldOwner, t.What, err)
	e.Log.Warn(text)
	e.Tell(corev1.EventTypeWarning, notice.EventFields, text, "")
}

// disown returns the JSON patch that removes fieldOwner from the managed fields of an object,
// unless somebody has written in between; nil if fieldOwner is not there.
func disown(o client.Object) ([]byte, error) {
	all := o.GetManagedFields()
	kept := slices.DeleteFunc(slices.Clone(all), func(e metav1.ManagedFieldsEntry) bool {
		return e.Manager == fieldOwner && e.Operation == metav1.ManagedFieldsOperationUpdate && e.Subresource == ""
	})
	if len(kept) == len(all) {
		return nil, nil
	}
	if len(kept) == 0 {
		kept = []metav1.ManagedFieldsEntry{{}} // an empty list would leave them as they are
	}
	// With another version this is a conflict: csaupgrade of client-go does the same.
	return json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/managedFields", "value": kept},
		{"op": "replace", "path": "/metadata/resourceVersion", "value": o.GetResourceVersion()},
	})
}
