// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// The app image is a small HTTP server that tests steer: it says which version and process it is,
// and ends, hangs or fails on demand.
//
// Environment: PORT (8080), REUSEPORT=1 (listen with SO_REUSEPORT), REUSEPORT=newest (and take all
// new connections from a process that listens already), IGNORE_TERM=1 (stay on SIGTERM),
// FAIL_START=1 (exit 3 at once), STARTUP_DELAY (Go duration before it listens), TERM_EXIT_CODE (0),
// TERM_DELAY (Go duration between SIGTERM and the end), TERM_MESSAGE (written to TERM_PATH,
// /dev/termination-log, when it ends), TICK=1 (a log line each second).
//
// Endpoints: / (JSON identity; ?env=A,B adds these variables), /healthz, /readyz, /ready?on=0|1,
// /health?on=0|1 (turn the former on or off), /exit?code=N, /hook?name=X (recorded), /hooks (what
// was recorded). `app call PATH` gets PATH from the server, for exec hooks and probes; `app
// version` prints the version.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "dev"

func main() {
	port := env("PORT", "8080")
	if len(os.Args) > 1 {
		os.Exit(command(port, os.Args[1:]))
	}
	a := &app{start: time.Now(), exit: make(chan int, 1)}
	a.ready.Store(true)
	a.healthy.Store(true)
	if err := a.run(port); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
	os.Exit(a.code)
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func delay(name string) time.Duration {
	d, err := time.ParseDuration(env(name, "0s"))
	if err != nil {
		fmt.Fprintf(os.Stderr, "app: %s: %v\n", name, err)
		os.Exit(2)
	}
	return d
}

func command(port string, args []string) int {
	switch {
	case args[0] == "version":
		fmt.Println(version)
		return 0
	case args[0] == "call" && len(args) == 2:
		client := http.Client{Timeout: 5 * time.Second}
		resp, err := client.Get("http://127.0.0.1:" + port + args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, "app:", err)
			return 1
		}
		defer resp.Body.Close()
		_, _ = io.Copy(os.Stdout, resp.Body)
		if resp.StatusCode/100 != 2 {
			return 1
		}
		return 0
	}
	fmt.Fprintln(os.Stderr, "usage: app [version | call PATH]")
	return 2
}

type app struct {
	start          time.Time
	ready, healthy atomic.Bool
	exit           chan int
	code           int

	mu    sync.Mutex
	hooks []string // guarded by mu
}

func (a *app) run(port string) error {
	hostname, _ := os.Hostname()
	fmt.Printf("app version=%s pid=%d hostname=%s start=%s\n", version, os.Getpid(), hostname,
		a.start.Format(time.RFC3339Nano))
	if os.Getenv("FAIL_START") == "1" {
		fmt.Fprintln(os.Stderr, "app: FAIL_START is set")
		a.end(3)
		return nil
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-time.After(delay("STARTUP_DELAY")):
	case <-signals:
		a.end(0)
		return nil
	}
	l, err := listen(":" + port)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: a.routes(hostname)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	fmt.Printf("app version=%s listens on %s\n", version, l.Addr())

	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; ; {
		select {
		case err := <-served:
			return err
		case code := <-a.exit:
			a.end(code)
			return nil
		case s := <-signals:
			fmt.Printf("app version=%s got %s\n", version, s)
			if os.Getenv("IGNORE_TERM") == "1" {
				continue
			}
			time.Sleep(delay("TERM_DELAY")) // the app's own behaviour under test, it keeps serving meanwhile
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			_ = server.Shutdown(ctx)
			cancel()
			code, _ := strconv.Atoi(env("TERM_EXIT_CODE", "0"))
			a.end(code)
			return nil
		case <-tick.C:
			if os.Getenv("TICK") == "1" {
				fmt.Printf("app version=%s pid=%d tick=%d\n", version, os.Getpid(), n)
				n++
			}
		}
	}
}

// listen listens as REUSEPORT says.
func listen(address string) (net.Listener, error) {
	share := os.Getenv("REUSEPORT")
	var config net.ListenConfig
	config.SetMultipathTCP(share != "newest") // its sockets take no program
	if share == "1" || share == "newest" {
		config.Control = func(_, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(
				c.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT,
						1)
				}), err)
		}
	}
	l, err := config.Listen(context.Background(), "tcp", address)
	if err != nil || share != "newest" {
		return l, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("%T is no TCP listener", l)
	}
	c, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	// Of a port's listeners, in the order in which they came, the second gets all new connections;
	// the only one does when there is no second. So the old process has had none for a while when
	// it is told to end: neither the kernel, which resets what a closed listener has not accepted,
	// nor net/http, which drops what has not sent its request, has any to drop.
	second := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}
	var failed error
	err = c.Control(func(fd uintptr) {
		failed = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
			&unix.SockFprog{Len: 1, Filter: &second[0]})
	})
	return l, errors.Join(err, failed)
}

func (a *app) end(code int) {
	if m := os.Getenv("TERM_MESSAGE"); m != "" {
		if err := os.WriteFile(env("TERM_PATH", "/dev/termination-log"), []byte(m), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "app:", err)
		}
	}
	a.code = code
	fmt.Printf("app version=%s ends with code %d\n", version, code)
}

func (a *app) routes(hostname string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		id := map[string]any{"version": version, "pid": os.Getpid(), "startTime": a.start.Format(time.RFC3339Nano),
			"hostname": hostname}
		if names := r.URL.Query().Get("env"); names != "" {
			vars := map[string]string{}
			for n := range strings.SplitSeq(names, ",") {
				if v, ok := os.LookupEnv(n); ok {
					vars[n] = v
				}
			}
			id["env"] = vars
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(id)
	})
	state := func(b *atomic.Bool) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if !b.Load() {
				http.Error(w, "off", http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	toggle := func(b *atomic.Bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			b.Store(r.URL.Query().Get("on") != "0")
			fmt.Fprintln(w, b.Load())
		}
	}
	mux.HandleFunc("/healthz", state(&a.healthy))
	mux.HandleFunc("/readyz", state(&a.ready))
	mux.HandleFunc("/health", toggle(&a.healthy))
	mux.HandleFunc("/ready", toggle(&a.ready))
	mux.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.URL.Query().Get("code"))
		if err != nil && r.URL.Query().Has("code") {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		select {
		case a.exit <- code:
		default:
		}
	})
	mux.HandleFunc("/hook", func(_ http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		name := r.URL.Query().Get("name")
		a.hooks = append(a.hooks, name)
		fmt.Printf("app version=%s hook %s\n", version, name)
	})
	mux.HandleFunc("/hooks", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(append([]string{}, a.hooks...))
	})
	return mux
}
