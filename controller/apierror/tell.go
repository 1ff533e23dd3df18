// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package apierror tells users what the API server refuses, and what is wrong with their objects.
package apierror

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
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// SpecError is what the user has to correct in an object. Its text says what is wrong and what to
// do.
type SpecError struct {
	Message string
	// Immutable says that the object was right before, and must not be changed.
	Immutable bool
}

// Error returns the message.
func (e *SpecError) Error() string { return e.Message }

// Wrong returns a *[SpecError] with this text.
func Wrong(format string, args ...any) error {
	return &SpecError{Message: fmt.Sprintf(format, args...)}
}

// Denied returns the words of the API server when it has refused for good: a policy, a quota, a
// webhook, a missing permission, an invalid object. ok is false for errors that may pass: a
// conflict, a time-out, a webhook that is away, an object that is gone.
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

// Tries is how often in a row the API server may fail before the object's users are told.
const Tries = 3

// Tell wraps a reconciler. When the API server has failed inner [Tries] times in a row for an
// object, Tell writes an Event on the object; else only the controller's log would know. newObject
// returns an empty object of the reconciler's kind. A nil recorder writes nothing.
func Tell(
	inner reconcile.Reconciler, newObject func() client.Object, reader client.Reader, recorder events.EventRecorder,
) reconcile.Reconciler {
	return &teller{
		inner: inner, newObject: newObject, reader: reader, recorder: recorder, failed: map[client.ObjectKey]int{},
	}
}

type teller struct {
	inner     reconcile.Reconciler
	newObject func() client.Object
	reader    client.Reader
	recorder  events.EventRecorder

	mu sync.Mutex
	// failed counts failures in a row, by object; guarded by mu.
	failed map[client.ObjectKey]int
}

// Reconcile implements reconcile.Reconciler.
func (t *teller) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	result, err := t.inner.Reconcile(ctx, request)
	if t.count(request.NamespacedName, err) && t.recorder != nil {
		object := t.newObject()
		if t.reader.Get(ctx, request.NamespacedName, object) == nil {
			note := fmt.Sprintf("the API server has said no %d times, and is asked again: %v", Tries, err)
			objects.Announce(t.recorder, object, corev1.EventTypeWarning, inplace.ReasonAPIError,
				inplace.ReasonAPIError, note)
		}
	}
	return result, err
}

// count counts an error, and says whether it is time to tell.
func (t *teller) count(key client.ObjectKey, err error) bool {
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
	return t.failed[key] == Tries
}
