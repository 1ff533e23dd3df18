// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

const (
	// readHeaders bounds how long a client may take for its request, as controller-runtime's own server does.
	readHeaders = 32 * time.Second
	// probesEnd is how long an answer under way is waited for at the end.
	probesEnd = time.Second
)

// note says something that a probe tells beside its checks: true, and no reason not to be Ready. Empty: nothing.
type note struct {
	name string
	text func() string
}

// health answers /healthz and /readyz. controller-runtime's own server has no room for notes.
type health struct {
	ready map[string]healthz.Checker
	notes []note
}

// check adds a condition for being Ready; all are added before serve.
func (h *health) check(name string, c healthz.Checker) { h.ready[name] = c }

// serve adds the server to a manager; address 0 is none.
func (h *health) serve(ctx context.Context, m ctrl.Manager, address string) error {
	if address == "0" {
		return nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--health-probe-bind-address: %w", err)
	}
	end := probesEnd
	return m.Add(&manager.Server{
		Name: "health probe", Listener: listener, ShutdownTimeout: &end,
		Server: &http.Server{Handler: h.handler(), ReadHeaderTimeout: readHeaders, IdleTimeout: 90 * time.Second, MaxHeaderBytes: 1 << 20},
	})
}

func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	alive := &healthz.Handler{Checks: map[string]healthz.Checker{"ping": healthz.Ping}}
	ready := h.noted(&healthz.Handler{Checks: h.ready})
	mux.Handle("/healthz", http.StripPrefix("/healthz", alive))
	mux.Handle("/healthz/", http.StripPrefix("/healthz", alive))
	mux.Handle("/readyz", http.StripPrefix("/readyz", ready))
	mux.Handle("/readyz/", http.StripPrefix("/readyz", ready))
	return mux
}

// noted adds the notes to an answer that somebody wants to read.
func (h *health) noted(inner http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r)
		if _, verbose := r.URL.Query()["verbose"]; !verbose || (r.URL.Path != "" && r.URL.Path != "/") {
			return
		}
		for _, n := range h.notes {
			if text := n.text(); text != "" {
				fmt.Fprintf(w, "note: %s: %s\n", n.name, text)
			}
		}
	})
}
