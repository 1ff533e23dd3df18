// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package apierror_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
)

var pods = schema.GroupResource{Resource: "pods"}

func TestDenied(t *testing.T) {
	reason := errors.New("image is not signed")
	for name, tt := range map[string]struct {
		err    error
		denied bool
	}{
		"a policy":          {apierrors.NewForbidden(pods, "p", reason), true},
		"an invalid object": {apierrors.NewBadRequest("no"), true},
		"a conflict":        {apierrors.NewConflict(pods, "p", reason), false},
		"gone":              {apierrors.NewNotFound(pods, "p"), false},
		"busy":              {apierrors.NewTooManyRequests("later", 1), false},
		"no credentials":    {apierrors.NewUnauthorized("who?"), false},
		"a webhook away":    {apierrors.NewInternalError(reason), false},
		"something else":    {reason, false},
		"nothing":           {nil, false},
	} {
		if words, denied := apierror.Denied(tt.err); denied != tt.denied || denied && words == "" {
			t.Errorf("%s: denied %v, %q", name, denied, words)
		}
	}
}

// TestTellAPIErrors: the third failure in a row is told on the object, once.
func TestTellAPIErrors(t *testing.T) {
	types, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p"}}
	recorder := events.NewFakeRecorder(100)
	bad := apierrors.NewForbidden(pods, "p", errors.New("image is not signed"))
	var answers []error
	inner := reconcile.Func(func(context.Context, reconcile.Request) (reconcile.Result, error) {
		next := answers[0]
		answers = answers[1:]
		return reconcile.Result{}, next
	})
	r := apierror.Tell(inner, func() client.Object { return &corev1.Pod{} }, fake.NewClientBuilder().WithScheme(types).
		WithObjects(pod).Build(), recorder)
	for _, tt := range []struct {
		name    string
		answers []error
		told    int
	}{
		{"twice", []error{bad, bad, nil}, 0},
		{"three times", []error{bad, bad, bad, nil}, 1},
		{"again and again", []error{bad, bad, bad, bad, bad, bad, nil}, 1},
		{"conflicts", []error{apierrors.NewConflict(pods, "p", nil), apierrors.NewConflict(pods, "p", nil),
			apierrors.NewConflict(pods, "p", nil), nil}, 0},
		{"with another error between", []error{bad, bad, errors.New("of a node"), bad, nil}, 1},
	} {
		answers = tt.answers
		for len(answers) > 0 {
			_, _ = r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(pod)})
		}
		var told []string
		for len(recorder.Events) > 0 {
			told = append(told, <-recorder.Events)
		}
		if len(told) != tt.told || len(told) > 0 && !strings.Contains(told[0], "image is not signed") {
			t.Errorf("%s: told %q", tt.name, told)
		}
	}
}
