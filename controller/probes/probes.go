// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package probes answers /healthz and /readyz.
package probes

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
	// readHeaders bounds how long a client may take for its request, as controller-runtime's own
	// server does.
	readHeaders = 32 * time.Second
	// shutdown is how long to wait for an answer under way at the end.
	shutdown = time.Second
)

// note is what /readyz?verbose tells beside its checks: something true that is no reason not to be
// Ready.
type note struct {
	name string
	text func() string
}

// Server answers the probes. controller-runtime's own server has no room for notes.
type Server struct {
	ready map[string]healthz.Checker
	notes []note
}

// New returns a server that is Ready.
func New() *Server { return &Server{ready: map[string]healthz.Checker{"ping": healthz.Ping}} }

// Check adds a condition for being Ready. Add all conditions before [Server.Serve].
func (h *Server) Check(name string, c healthz.Checker) { h.ready[name] = c }

// Note adds a note. An empty text is not told. Add all notes before [Server.Serve].
func (h *Server) Note(name string, text func() string) { h.notes = append(h.notes, note{name, text}) }

// Serve adds the server to a manager. Address "0" serves nowhere.
func (h *Server) Serve(ctx context.Context, m ctrl.Manager, address string) error {
	if address == "0" {
		return nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("--health-probe-bind-address: %w", err)
	}
	end := shutdown
	return m.Add(&manager.Server{
		Name: "health probe", Listener: listener, ShutdownTimeout: &end,
		Server: &http.Server{
			Handler: h.Handler(), ReadHeaderTimeout: readHeaders, IdleTimeout: 90 * time.Second,
			MaxHeaderBytes: 1 << 20,
		},
	})
}

// Handler answers the requests.
func (h *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	alive := &healthz.Handler{Checks: map[string]healthz.Checker{"ping": healthz.Ping}}
	ready := h.noted(&healthz.Handler{Checks: h.ready})
	mux.Handle("/healthz", http.StripPrefix("/healthz", alive))
	mux.Handle("/healthz/", http.StripPrefix("/healthz", alive))
	mux.Handle("/readyz", http.StripPrefix("/readyz", ready))
	mux.Handle("/readyz/", http.StripPrefix("/readyz", ready))
	return mux
}

// noted adds the notes to a verbose answer.
func (h *Server) noted(inner http.Handler) http.Handler {
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
