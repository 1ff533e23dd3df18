// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"net/http"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

type paths map[string]http.Handler

func (p paths) Register(path string, hook http.Handler) { p[path] = hook }

// While OpenKruise is there, OpenKruise refuses its own kinds. Rollouts are ours.
func TestAside(t *testing.T) {
	there, served := false, paths{}
	a := Aside(served, func() bool { return there })
	for _, path := range []string{PathDefaultRecreate, PathValidateRecreate, PathValidateJob, PathValidateList,
		PathValidateRollout} {
		a.Register(path,
			&admission.Webhook{
				Handler: admission.HandlerFunc(func(context.Context, admission.Request) admission.Response {
					return admission.Denied("wrong")
				})})
	}
	for _, there = range []bool{false, true} {
		for path, hook := range served {
			got := hook.(*admission.Webhook).Handler.Handle(t.Context(), admission.Request{}).Allowed
			if want := there && path != PathValidateRollout; got != want {
				t.Errorf("OpenKruise there %v: %s lets through %v, want %v", there, path, got, want)
			}
		}
	}
}
