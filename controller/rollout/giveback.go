// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

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
)

// fieldOwner is the field manager of what rollouts write into workloads.
const fieldOwner = "cri-controller"

// giveBack takes away the controller's claim on the fields of the workload that it has written. A rollout that has ended wants nothing of
// them any more, and a server-side apply of those whose workload it is would be refused for them. It does not hold up the end of the
// rollout, unless somebody else has written in between.
func (p *pass) giveBack(ctx context.Context) error {
	if p.target == nil || p.target.workload == nil {
		return nil
	}
	o, ok := p.target.workload.written().DeepCopyObject().(client.Object)
	if !ok {
		return nil // never
	}
	err := p.r.APIReader.Get(ctx, client.ObjectKeyFromObject(o), o) // the cache has no managed fields
	if apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		p.keeps(err)
		return nil
	}
	patch, err := disown(o)
	if patch == nil || err != nil {
		return err
	}
	err = p.r.Client.Patch(ctx, o, client.RawPatch(types.JSONPatchType, patch), client.FieldOwner(fieldOwner))
	switch {
	case err == nil:
		p.r.Metrics.wrote(p.rollout.Spec.Target.WorkloadRef.Kind)
	case !apierrors.IsConflict(err):
		p.keeps(err)
		err = nil
	}
	return err
}

// keeps tells that the fields stay the controller's.
func (p *pass) keeps(err error) {
	text := fmt.Sprintf("field manager %s still owns what the rollout has written into %s, and a server-side apply of that needs --force-conflicts: it cannot be given back: %s", fieldOwner, p.target.what, err)
	p.log.Warn(text)
	p.tell(corev1.EventTypeWarning, eventFields, text, "")
}

// disown is the JSON patch that takes fieldOwner out of the managed fields of an object, unless somebody has written in between; nil when
// it is not there.
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
