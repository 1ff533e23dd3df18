// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// leavePage is how many objects one answer of the API server has.
const leavePage = 500

// Leave puts pods back into service that requests have taken out of it, before the controller goes
// for good. It returns how many requests had done that. It takes no finalizers off. c must read
// past the cache. Leave goes on after an error.
func Leave(ctx context.Context, c client.Client, log logrus.FieldLogger) (int, error) {
	r := &Reconciler{Client: c, APIReader: c, Log: log}
	var errs []error
	had := 0
	list := &appsv1alpha1.ContainerRecreateRequestList{}
	for {
		if err := c.List(ctx, list, client.Limit(leavePage), client.Continue(list.Continue)); err != nil {
			if meta.IsNoMatchError(err) {
				err = nil
			}
			return had, errors.Join(append(errs, err)...)
		}
		for i := range list.Items {
			crr := &list.Items[i]
			if !slices.Contains(crr.Finalizers, accept.Finalizer) ||
				!slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) {
				continue
			}
			if err := retry.RetryOnConflict(retry.DefaultRetry,
				func() error { return r.release(ctx, crr) }); err != nil {
				errs = append(errs, fmt.Errorf("request %s: %w", client.ObjectKeyFromObject(crr), err))
				continue
			}
			had++
		}
		if list.Continue == "" {
			return had, errors.Join(errs...)
		}
	}
}
