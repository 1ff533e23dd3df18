// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"net/http"

	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

// Aside returns a server whose webhooks for OpenKruise's kinds let every object through while there
// returns true. there says that OpenKruise, with webhooks of its own, is in the cluster: then
// OpenKruise refuses and completes these objects.
func Aside(server mux, there func() bool) mux { return aside{server, there} }

type aside struct {
	server mux
	there  func() bool
}

// Register implements mux.
func (a aside) Register(path string, hook http.Handler) {
	if w, ok := hook.(*admission.Webhook); ok && path != PathValidateRollout {
		inner := w.Handler
		w.Handler = admission.HandlerFunc(func(ctx context.Context, req admission.Request) admission.Response {
			if a.there() {
				return admission.Allowed("")
			}
			return inner.Handle(ctx, req)
		})
	}
	a.server.Register(path, hook)
}
