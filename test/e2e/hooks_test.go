// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// hookServer notes the requests of hooks, by path and by who sent them.
type hookServer struct {
	*httptest.Server
	mu       sync.Mutex
	requests map[string][]string // guarded by mu
}

func newHookServer(t testing.TB, encrypted bool) *hookServer {
	s := &hookServer{requests: map[string][]string{}}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sender := "kubelet"
		if strings.HasSuffix(r.UserAgent(), "/cri-proxy") {
			sender = "cri-proxy"
		}
		headers := []string{}
		for name, values := range r.Header {
			// Kubelet keeps the connection for the next one; the other names the sender.
			if name != "Connection" && name != "User-Agent" {
				headers = append(headers, fmt.Sprintf("%s=%q", name, values))
			}
		}
		slices.Sort(headers)
		s.mu.Lock()
		defer s.mu.Unlock()
		key := sender + r.URL.Path
		s.requests[key] = append(s.requests[key], fmt.Sprintf("%s %s host=%s tls=%v %s", r.Method, r.RequestURI, r.Host,
			r.TLS != nil, strings.Join(headers, " ")))
		if strings.HasPrefix(r.URL.Path, "/refused") {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	if encrypted {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func (s *hookServer) port() int {
	addr, _ := s.Listener.Addr().(*net.TCPAddr)
	return addr.Port
}

func (s *hookServer) seen(key string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests[key])
}

// heldHook is a server for a hook that lasts until it is released.
type heldHook struct {
	*httptest.Server
	reached chan struct{}
	release func()
}

func newHeldHook(t testing.TB) *heldHook {
	h := &heldHook{reached: make(chan struct{})}
	released := make(chan struct{})
	h.release = sync.OnceFunc(func() { close(released) })
	reach := sync.OnceFunc(func() { close(h.reached) })
	h.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		reach()
		select {
		case <-released:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { h.release(); h.Close() })
	return h
}

// preStop gives the first container of a pod of threeContainers the hook, and the pod the time for
// it.
func (h *heldHook) preStop(pod string) string {
	addr, _ := h.Listener.Addr().(*net.TCPAddr)
	pod = strings.Replace(pod, "terminationGracePeriodSeconds: 5", "terminationGracePeriodSeconds: 90", 1)
	return strings.Replace(pod, "    command:",
		fmt.Sprintf("    lifecycle: {preStop: {httpGet: {host: 127.0.0.1, port: %d, path: /}}}\n    command:",
			addr.Port), 1)
}

// containerEvents returns what has been told about one container of a pod, "reason message" by
// line.
func containerEvents(t testing.TB, ns, pod, name string) string {
	t.Helper()
	list := &corev1.EventList{}
	must(t, api.List(t.Context(), list, client.InNamespace(ns)))
	var out []string
	for _, e := range list.Items {
		if e.InvolvedObject.Name == pod && e.InvolvedObject.FieldPath == "spec.containers{"+name+"}" {
			out = append(out, e.Reason+" "+e.Message)
		}
	}
	return strings.Join(out, "\n")
}

// TestHooks restarts containers with every kind of hook. What we send is what kubelet sends when it
// runs the same hooks itself, at the pod's start and at its end; what fails is told in kubelet's
// words.
func TestHooks(t *testing.T) {
	ns := namespace(t)
	encrypted, plain := newHookServer(t, true), newHookServer(t, false)
	loop := func(name, rest string) string {
		return fmt.Sprintf(`
  - name: %s
    image: "%s"
    command: [sh, -c, "trap exit TERM; while :; do sleep 0.1; done"]
    volumeMounts: [{name: work, mountPath: /work}]
    %s`, name, bed.Image("busybox:1.0"), rest)
	}
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: hooks, namespace: %s}
spec:
  terminationGracePeriodSeconds: 4
  volumes: [{name: work, emptyDir: {}}]
  containers:`, ns)+
		loop("https", fmt.Sprintf(`ports: [{name: hook, containerPort: %[1]d}]
    lifecycle:
      postStart: {httpGet: {host: 127.0.0.1, port: %[1]d, scheme: HTTPS, path: "/https/post?a=b%%20c"}}
      preStop: {httpGet: {host: 127.0.0.1, port: hook, scheme: HTTPS, path: /https/pre, httpHeaders: [{name: Host, value: shop.example}, {name: x-a, value: "1"}, {name: X-A, value: "2"}, {name: Accept, value: ""}]}}`, encrypted.port()))+
		loop("fallback", fmt.Sprintf(`lifecycle:
      preStop: {httpGet: {host: 127.0.0.1, port: %d, scheme: HTTPS, path: fallback/pre, httpHeaders: [{name: Authorization, value: secret}]}}`, plain.port()))+
		loop("refused", fmt.Sprintf(`lifecycle:
      postStart: {httpGet: {host: 127.0.0.1, port: %[1]d, path: /refused/post}}
      preStop: {httpGet: {host: 127.0.0.1, port: %[1]d, path: /refused/pre}}`, plain.port()))+
		loop("exec", `lifecycle:
      postStart: {exec: {command: [sh, -c, "echo x >> /work/post"]}}
      preStop: {exec: {command: [sh, -c, "echo x >> /work/pre; echo s3cret; exit 3"]}}`)+
		loop("tcp", `lifecycle: {preStop: {tcpSocket: {port: 80}}}`)+
		loop("unnamed", `lifecycle: {preStop: {httpGet: {port: nope}}}`)+
		loop("late", `lifecycle: {preStop: {exec: {command: [sh, -c, "date +%s > /work/late; sleep 60"]}}}`)+
		loop("failing",
			`lifecycle: {postStart: {exec: {command: [sh, -c, "echo x >> /work/failing; echo s3cret; [ $(wc -l < /work/failing) != 2 ]"]}}}`))
	ready(t, ns, "hooks")
	apply(t, recreate(ns, "hooks-restart", "hooks", `strategy: {failurePolicy: Ignore}
  containers: [{name: https}, {name: fallback}, {name: refused}, {name: exec}, {name: tcp}, {name: unnamed}, {name: late}, {name: failing}]`))
	crr := completed(t, ns, "hooks-restart")
	for _, s := range crr.Status.ContainerRecreateStates {
		want := appsv1alpha1.ContainerRecreateRequestSucceeded
		if s.Name == "failing" {
			want = appsv1alpha1.ContainerRecreateRequestFailed
		}
		if s.Phase != want {
			t.Errorf("state: %+v", s)
		}
	}

	// Hooks that failed.
	for name, want := range map[string][]string{
		"exec":    {"FailedPreStopHook PreStopHook failed"},
		"tcp":     {"FailedPreStopHook PreStopHook failed"},
		"unnamed": {"FailedPreStopHook PreStopHook failed"},
		"failing": {"FailedPostStartHook PostStartHook failed",
			"RestartFailed ContainerRecreateRequest hooks-restart, container failing: the postStart hook failed and " +
				"the new container was stopped"},
	} {
		for _, w := range want {
			eventually(t, "event "+w+" of container "+name,
				func() bool { return strings.Contains(containerEvents(t, ns, "hooks", name), w) })
		}
	}
	for _, name := range []string{"https", "fallback", "refused"} {
		if told := containerEvents(t, ns, "hooks", name); strings.Contains(told, "Failed") {
			t.Errorf("container %s: %s", name, told)
		}
		if w := account(t, crr, name).GetWarnings(); len(w) > 0 {
			t.Errorf("container %s: warnings %q", name, w)
		}
	}
	for _, want := range []string{
		"FailedPreStopHook container exec: PreStopHook failed", "FailedPreStopHook container tcp: PreStopHook failed",
		"FailedPostStartHook container failing: PostStartHook failed",
	} {
		eventually(t, "event "+want+" of the request",
			func() bool { return strings.Contains(events(t, ns, "hooks-restart"), want) })
	}
	if all := events(t, ns, "hooks-restart") + events(t, ns, "hooks"); strings.Contains(all, "s3cret") {
		t.Errorf("events repeat what a hook printed:\n%s", all)
	}
	late := account(t, crr, "late")
	if late.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || len(late.GetWarnings()) != 1 ||
		!strings.HasPrefix(late.GetWarnings()[0], "preStop hook") {
		t.Errorf("operation: %v", late)
	}
	op, err := opsClient(t).GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: string(crr.UID) + ".late"})
	must(t, err)
	hooked, err := strconv.ParseInt(kubectl(t, "-n", ns, "exec", "hooks", "-c", "exec", "--", "cat", "/work/late"), 10,
		64)
	must(t, err)
	// The hook has the 4 s of grace, and the stop after it has kubelet's floor of 2 s. When it
	// began is known to the second.
	took, most := late.GetStopTime().AsTime().Sub(op.GetCreateTime().AsTime()), late.GetStopTime().AsTime().
		Sub(time.Unix(hooked, 0))
	if took < 4*time.Second || most > 9*time.Second {
		t.Errorf("stopped after %s, %s after the hook began, the grace is 4 s", took, most)
	}
	if out := kubectl(t, "-n", ns, "exec", "hooks", "-c", "exec", "--", "cat", "/work/pre",
		"/work/post"); out != "x\nx\nx" {
		t.Errorf("the hooks of exec left %q, want one run of preStop and two of postStart", out)
	}
	// A container that was stopped for its hook is kubelet's to start again.
	eventually(t, "kubelet starts container failing",
		func() bool { return container(t, getPod(t, ns, "hooks"), "failing").Ready })

	kubectl(t, "-n", ns, "delete", "pod", "hooks", "--wait=true")
	for key, server := range map[string]*hookServer{
		"/https/post": encrypted, "/https/pre": encrypted, "/fallback/pre": plain, "/refused/post": plain,
		"/refused/pre": plain,
	} {
		kubelets, ours := server.seen("kubelet"+key), server.seen("cri-proxy"+key)
		if len(kubelets) != 1 || !slices.Equal(kubelets, ours) {
			t.Errorf("%s\n kubelet sent %q\ncri-proxy sent %q", key, kubelets, ours)
		}
	}
}

// TestHostNetworkHook restarts a container in the host's network, of which the runtime knows no
// address, with a hook that goes to the pod's.
func TestHostNetworkHook(t *testing.T) {
	ns := namespace(t)
	// Free on all addresses, and below those that the kernel takes for connections of its own
	// choice (ip(7), ip_local_port_range).
	port := ""
	for n := 20000 + rand.IntN(10000); port == ""; n++ {
		if n > 32000 {
			t.Fatal("no port is free")
		}
		if l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", fmt.Sprintf(":%d", n)); err == nil {
			port = strconv.Itoa(n)
			must(t, l.Close())
		}
	}
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: %[1]s}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 3
  containers:
  - name: app
    image: "%[2]s"
    env: [{name: PORT, value: "%[3]s"}]
    readinessProbe: {httpGet: {path: /readyz, port: %[3]s}, periodSeconds: 1}
    lifecycle: {preStop: {httpGet: {path: "/hook?name=bye", port: %[3]s}}}
`, ns, bed.Image("app:1"), port))
	ready(t, ns, "host")
	apply(t, recreate(ns, "restart", "host", "containers: [{name: app}]"))
	crr := succeededAll(t, ns, "restart")
	if out := kubectl(t, "-n", ns, "logs", "host", "--previous"); !strings.Contains(out, "hook bye") {
		t.Errorf("the hook did not reach the container:\n%s", out)
	}
	if w := account(t, crr, "app").GetWarnings(); len(w) > 0 {
		t.Errorf("warnings: %q", w)
	}
}
