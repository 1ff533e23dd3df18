// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// httpServer serves /metrics, /healthz and /readyz.
type httpServer struct{ s *http.Server }

func newHTTPServer(d *daemon) *httpServer {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		promhttp.HandlerFor(d.gatherers(), promhttp.HandlerOpts{Registry: d.registry}).ServeHTTP(w, r)
	})
	// Alive: the CRI listener answers. The runtime has no part in it, a restart of
	// the proxy would not bring it back.
	mux.HandleFunc("GET /healthz", check(d.alive))
	// Ready: kubelet is served.
	mux.HandleFunc("GET /readyz", check(func(ctx context.Context) error {
		if d.draining.Load() {
			return errors.New("draining")
		}
		return d.alive(ctx)
	}))
	return &httpServer{&http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
	}}
}

// Serve answers on l until stop.
func (h *httpServer) Serve(l net.Listener) error {
	if err := h.s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// stop ends the server with its connections; a scrape can be repeated. A nil
// server is stopped already.
func (h *httpServer) stop() {
	if h != nil {
		_ = h.s.Close()
	}
}

func check(healthy func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := healthy(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}
