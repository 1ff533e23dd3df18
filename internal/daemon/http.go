// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/connectivity"
)

// httpServer serves /metrics, /healthz and /readyz.
type httpServer struct{ s *http.Server }

func newHTTPServer(d *daemon) *httpServer {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		promhttp.HandlerFor(d.gatherers(), promhttp.HandlerOpts{Registry: d.registry}).ServeHTTP(w, r)
	})
	// Alive: the CRI listener answers. The runtime takes no part: a restart of the proxy would not
	// bring it back.
	cri := check{name: "cri", healthy: d.alive}
	mux.HandleFunc("GET /healthz", checks("healthz", cri))
	// Ready: kubelet is served. The answer names other problems too, but they do not count.
	mux.HandleFunc("GET /readyz", checks("readyz", check{name: "draining", healthy: d.notDraining}, cri,
		check{name: "runtime", healthy: d.runtimeConnected, informative: true},
		check{name: "journal", healthy: d.journalUsable, informative: true},
		check{name: "bypass", healthy: d.notBypassed, informative: true},
	))
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

// stop ends the server and its connections; a scrape can be repeated. A nil server is stopped
// already.
func (h *httpServer) stop() {
	if h != nil {
		_ = h.s.Close()
	}
}

func (d *daemon) notDraining(context.Context) error {
	if d.draining.Load() {
		return fmt.Errorf("draining, %d calls are left", d.cri.Stats().InFlight)
	}
	return nil
}

func (d *daemon) runtimeConnected(context.Context) error {
	if s := d.upstream.State(); s != connectivity.Ready {
		return fmt.Errorf("%s is away (%s)", d.upstream.Endpoint(), s)
	}
	return nil
}

func (d *daemon) journalUsable(context.Context) error {
	st := d.state.Load()
	if st == nil {
		return errors.New("another process has it")
	}
	return st.engine.JournalError()
}

func (d *daemon) notBypassed(context.Context) error {
	if s := d.bypassed(); s != "" {
		return errors.New(s)
	}
	return nil
}

// check is one line of a verbose answer.
type check struct {
	name    string
	healthy func(context.Context) error
	// informative checks are shown, and do not make the answer a failure.
	informative bool
}

// checks answers as kube-apiserver does: "ok", and line by line with ?verbose or when a check
// fails; ?exclude=NAME leaves one out.
func checks(path string, all ...check) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		exclude := map[string]bool{}
		for _, name := range q["exclude"] {
			exclude[name] = true
		}
		var lines strings.Builder
		failed := false
		for _, c := range all {
			if exclude[c.name] {
				fmt.Fprintf(&lines, "[+]%s excluded: ok\n", c.name)
				continue
			}
			switch err := c.healthy(r.Context()); {
			case err == nil:
				fmt.Fprintf(&lines, "[+]%s ok\n", c.name)
			case c.informative:
				fmt.Fprintf(&lines, "[!]%s: %v (does not count)\n", c.name, err)
			default:
				failed = true
				fmt.Fprintf(&lines, "[-]%s failed: %v\n", c.name, err)
			}
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		switch {
		case failed:
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintf(w, "%s%s check failed\n", &lines, path)
		case q.Has("verbose"):
			fmt.Fprintf(w, "%s%s check passed\n", &lines, path)
		default:
			fmt.Fprintln(w, "ok")
		}
	}
}
