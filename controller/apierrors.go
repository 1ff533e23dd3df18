// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// Denied returns the words of the API server when it has said no for good: a policy, a quota, a webhook, a missing permission, an invalid
// object. What may pass by itself is not that: conflicts, time-outs, a webhook that is away, an object that is gone.
func Denied(err error) (words string, ok bool) {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return "", false
	}
	switch code := status.Status().Code; {
	case code == http.StatusNotFound, code == http.StatusConflict, code == http.StatusTooManyRequests,
		code == http.StatusUnauthorized, code == http.StatusRequestTimeout, code == http.StatusGone:
		return "", false
	case code < http.StatusBadRequest || code >= http.StatusInternalServerError:
		return "", false
	}
	return status.Status().Message, true
}

// APITries is how often in a row the API server may fail before the object's users are told.
const APITries = 3

// TellAPIErrors is a reconciler that does what inner does and, when the API server has failed inner several times in a row, says so with an
// event on the object, which newObject makes an empty one of. Without that only the log of the controller would know.
func TellAPIErrors(inner reconcile.Reconciler, newObject func() client.Object, reader client.Reader, recorder events.EventRecorder) reconcile.Reconciler {
	return &apiErrorTeller{inner: inner, newObject: newObject, reader: reader, recorder: recorder, failed: map[client.ObjectKey]int{}}
}

type apiErrorTeller struct {
	inner     reconcile.Reconciler
	newObject func() client.Object
	reader    client.Reader
	recorder  events.EventRecorder

	mu sync.Mutex
	// failed counts by object; guarded by mu.
	failed map[client.ObjectKey]int
}

// Reconcile implements reconcile.Reconciler.
func (t *apiErrorTeller) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	result, err := t.inner.Reconcile(ctx, request)
	if t.note(request.NamespacedName, err) && t.recorder != nil {
		object := t.newObject()
		if t.reader.Get(ctx, request.NamespacedName, object) == nil {
			t.recorder.Eventf(object, nil, corev1.EventTypeWarning, inplace.ReasonAPIError, inplace.ReasonAPIError, "%s",
				eventNote(fmt.Sprintf("the API server has said no %d times, and is asked again: %v", APITries, err)))
		}
	}
	return result, err
}

// note counts, and says whether it is time to tell.
func (t *apiErrorTeller) note(key client.ObjectKey, err error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	var status apierrors.APIStatus
	if !errors.As(err, &status) || apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		if err == nil {
			delete(t.failed, key)
		}
		return false
	}
	t.failed[key]++
	return t.failed[key] == APITries
}
