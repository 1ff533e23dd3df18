// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package hooks_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/hooks"
)

// fakeRuntime has one sandbox and answers each command.
type fakeRuntime struct {
	runtimeapi.RuntimeServiceClient
	ip      string // of the sandbox
	timeout int64  // of the last command
}

const sandbox = "sandbox"

func (f *fakeRuntime) PodSandboxStatus(
	_ context.Context, r *runtimeapi.PodSandboxStatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.PodSandboxStatusResponse, error) {
	if r.GetPodSandboxId() != sandbox {
		return nil, status.Error(codes.NotFound, "no such sandbox")
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: f.ip},
	}}, nil
}

func (f *fakeRuntime) ExecSync(
	_ context.Context, r *runtimeapi.ExecSyncRequest, _ ...grpc.CallOption,
) (*runtimeapi.ExecSyncResponse, error) {
	f.timeout = r.GetTimeout()
	return &runtimeapi.ExecSyncResponse{}, nil
}

// newRunner returns a Runner that is closed with the test.
func newRunner(t *testing.T, f *fakeRuntime) *hooks.Runner {
	t.Helper()
	r := hooks.NewRunner(f)
	t.Cleanup(r.Close)
	return r
}

func execHook(cmd ...string) *opsv1.Hook {
	return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: cmd}}}
}

func httpHook(a *opsv1.HTTPGetAction) *opsv1.Hook {
	return &opsv1.Hook{Action: &opsv1.Hook_HttpGet{HttpGet: a}}
}

func TestRecordedPreStop(t *testing.T) {
	const ports = `[{"name":"web","containerPort":8080},{"name":"admin","containerPort":9090},` +
		`{"name":"big","containerPort":70000}]`
	cases := []struct {
		name, recorded string
		want           *opsv1.Hook
		err            string
	}{
		{name: "none"},
		{name: "exec", recorded: `{"exec":{"command":["sh","-c","x"]}}`, want: execHook("sh", "-c", "x")},
		{
			name: "sleep", recorded: `{"sleep":{"seconds":5}}`,
			want: &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 5}}},
		},
		{
			name: "http",
			recorded: `{"httpGet":{"path":"/bye?x=1","port":80,"host":"h","scheme":"HTTPS",` +
				`"httpHeaders":[{"name":"A","value":"b"}]}}`,
			want: httpHook(&opsv1.HTTPGetAction{
				Path: "/bye?x=1", Port: 80, Host: "h", Scheme: "HTTPS",
				Headers: []*opsv1.HTTPHeader{{Name: "A", Value: "b"}},
			}),
		},
		{name: "named port", recorded: `{"httpGet":{"port":"admin"}}`,
			want: httpHook(&opsv1.HTTPGetAction{Port: 9090})},
		{name: "number as a name", recorded: `{"httpGet":{"port":"81"}}`, err: `the container has no port named "81"`},
		{name: "port 0", recorded: `{"httpGet":{"port":0}}`, err: "0 is not a port number"},
		{name: "port too high", recorded: `{"httpGet":{"port":"big"}}`, err: "70000 is not a port number"},
		{name: "unknown port", recorded: `{"httpGet":{"port":"nope"}}`, err: `the container has no port named "nope"`},
		{name: "no port", recorded: `{"httpGet":{}}`, err: "port"},
		{name: "odd port", recorded: `{"httpGet":{"port":[]}}`, err: "port []"},
		{name: "tcpSocket", recorded: `{"tcpSocket":{"port":80}}`, err: "no action that can be run"},
		{name: "empty", recorded: `{}`, err: "no action that can be run"},
		{name: "not JSON", recorded: `sh -c x`, err: criclone.AnnotationPreStop},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			got, err := hooks.RecordedPreStop(map[string]string{
				criclone.AnnotationPreStop: tc.recorded, criclone.AnnotationPorts: ports,
			})
			if (err == nil) != (tc.err == "") || (err != nil && !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error is %v, want %q", err, tc.err)
			}
			if !proto.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	_, err := hooks.RecordedPreStop(map[string]string{
		criclone.AnnotationPreStop: `{"httpGet":{"port":"x"}}`, criclone.AnnotationPorts: `{`,
	})
	if err == nil || !strings.Contains(err.Error(), criclone.AnnotationPorts) {
		t.Errorf("ports that are not JSON: %v", err)
	}
}

// The request is the one that kubelet would make (pkg/kubelet/lifecycle/handlers.go,
// pkg/probe/http/request.go).
func TestHTTPHook(t *testing.T) {
	type seen struct{ uri, host, agent, accept, custom, credentials string }
	for _, tls := range []bool{false, true} {
		requests := make(chan seen, 10)
		mux := http.NewServeMux()
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			all := func(name string) string { return strings.Join(r.Header.Values(name), ",") }
			requests <- seen{
				r.RequestURI, r.Host, all("User-Agent"), all("Accept"), all("X-A"), r.Header.Get("Authorization"),
			}
			switch r.URL.Path {
			case "/busy":
				w.WriteHeader(http.StatusServiceUnavailable)
			case "/moved":
				http.Redirect(w, r, "/there", http.StatusFound)
			case "/away":
				http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
			}
		})
		server := httptest.NewUnstartedServer(mux)
		if tls {
			server.StartTLS()
		} else {
			server.Start()
		}
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		port, err := strconv.Atoi(u.Port())
		if err != nil {
			t.Fatal(err)
		}
		at := func(path string, headers ...*opsv1.HTTPHeader) *opsv1.HTTPGetAction {
			return &opsv1.HTTPGetAction{
				Port: int32(port), Path: path, Headers: headers, Scheme: map[bool]string{true: "HTTPS"}[tls],
			}
		}
		plain := func(uri string) seen {
			return seen{uri: uri, host: u.Host, agent: "kube-lifecycle/cri-proxy", accept: "*/*"}
		}
		cases := []struct {
			name string
			a    *opsv1.HTTPGetAction
			want []seen
			err  string
		}{
			{name: "no path", a: at(""), want: []seen{plain("/")}},
			{name: "path and query", a: at("/a/b?c=d"), want: []seen{plain("/a/b?c=d")}},
			{name: "relative path", a: at("a"), want: []seen{plain("/a")}},
			{name: "escaped path", a: at("/a%2Fb"), want: []seen{plain("/a%2Fb")}},
			{name: "path that cannot be parsed", a: at("/%zz"), want: []seen{plain("/%25zz")}},
			{
				name: "headers",
				a:    at("/", &opsv1.HTTPHeader{Name: "X-A", Value: "1"}, &opsv1.HTTPHeader{Name: "x-a", Value: "2"}),
				want: []seen{{uri: "/", host: u.Host, agent: "kube-lifecycle/cri-proxy", accept: "*/*", custom: "1,2"}},
			},
			{
				name: "headers of ours",
				a: at("/", &opsv1.HTTPHeader{Name: "user-agent", Value: "me"},
					&opsv1.HTTPHeader{Name: "Accept", Value: "text/plain"},
					&opsv1.HTTPHeader{Name: "host", Value: "shop.example"}),
				want: []seen{{uri: "/", host: "shop.example", agent: "me", accept: "text/plain"}},
			},
			{
				name: "empty Accept", a: at("/", &opsv1.HTTPHeader{Name: "accept"}),
				want: []seen{{uri: "/", host: u.Host, agent: "kube-lifecycle/cri-proxy"}},
			},
			{
				name: "two hosts",
				a:    at("/", &opsv1.HTTPHeader{Name: "Host", Value: "a"}, &opsv1.HTTPHeader{Name: "Host", Value: "b"}),
				want: []seen{{uri: "/", host: "a", agent: "kube-lifecycle/cri-proxy", accept: "*/*"}},
			},
			{
				name: "credentials", a: at("/", &opsv1.HTTPHeader{Name: "Authorization", Value: "x"}),
				want: []seen{{uri: "/", host: u.Host, agent: "kube-lifecycle/cri-proxy", accept: "*/*",
					credentials: "x"}},
			},
			{name: "an error is an answer", a: at("/busy"), want: []seen{plain("/busy")}},
			{name: "redirect on the host", a: at("/moved"), want: []seen{plain("/moved"), plain("/there")}},
			{name: "another host", a: at("/away"), want: []seen{plain("/away")}},
		}
		if tls {
			plainServer := httptest.NewServer(mux)
			pu, err := url.Parse(plainServer.URL)
			if err != nil {
				t.Fatal(err)
			}
			pport, err := strconv.Atoi(pu.Port())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(plainServer.Close)
			cases = append(cases, struct {
				name string
				a    *opsv1.HTTPGetAction
				want []seen
				err  string
			}{
				name: "no TLS there",
				want: []seen{
					{uri: "/x", host: pu.Host, agent: "kube-lifecycle/cri-proxy", accept: "*/*", custom: "1"},
				},
				a: &opsv1.HTTPGetAction{
					Scheme: "HTTPS", Port: int32(pport), Path: "/x",
					Headers: []*opsv1.HTTPHeader{{Name: "Authorization", Value: "x"}, {Name: "X-A", Value: "1"}},
				},
			})
		}
		for _, tc := range cases {
			t.Run(map[bool]string{true: "https ", false: "http "}[tls]+tc.name, func(t *testing.T) {
				err := newRunner(t, &fakeRuntime{ip: "127.0.0.1"}).Run(t.Context(), httpHook(tc.a), "c", sandbox)
				if (err == nil) != (tc.err == "") || (err != nil && !strings.Contains(err.Error(), tc.err)) {
					t.Errorf("error is %v, want %q", err, tc.err)
				}
				for _, want := range tc.want {
					select {
					case got := <-requests:
						if got != want {
							t.Errorf("got  %+v\nwant %+v", got, want)
						}
					default:
						t.Errorf("no request, want %+v", want)
					}
				}
				if len(requests) > 0 {
					t.Errorf("one more request: %+v", <-requests)
				}
			})
		}
		server.Close()
	}
	t.Run("nobody listens", func(t *testing.T) {
		runner := newRunner(t, &fakeRuntime{}) // host network: the loopback
		hook := httpHook(&opsv1.HTTPGetAction{Port: refusingPort(t)})
		err := runner.Run(t.Context(), hook, "c", sandbox)
		if err == nil || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("got %v", err)
		}
		err = runner.Run(t.Context(), hook, "c", "nope")
		if err == nil || !strings.Contains(err.Error(), "finding the pod's address") {
			t.Errorf("got %v", err)
		}
		if err := runner.Run(t.Context(), &opsv1.Hook{}, "c", "s"); err == nil {
			t.Error("an empty hook is run")
		}
	})
}

// refusingPort is a port of the loopback that stays taken and on which nobody listens.
func refusingPort(t *testing.T) int32 {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return int32(at.(*unix.SockaddrInet4).Port)
}

// A command has all of the time that is left, also when that is no whole number of seconds.
func TestExecHookTimeout(t *testing.T) {
	for _, tt := range []struct {
		left time.Duration
		want int64
	}{{3500 * time.Millisecond, 4}, {900 * time.Millisecond, 1}, {0, 0}} {
		t.Run(tt.left.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // where no time passes
				f := &fakeRuntime{}
				ctx := t.Context()
				if tt.left > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.left)
					defer cancel()
				}
				if err := newRunner(t, f).Run(ctx, execHook("x"), "c", sandbox); err != nil {
					t.Error(err)
				}
				if f.timeout != tt.want {
					t.Errorf("timeout of %d s, want %d", f.timeout, tt.want)
				}
			})
		})
	}
}

// FuzzRecordedPreStop reads any annotations as hooks.
func FuzzRecordedPreStop(f *testing.F) {
	for _, s := range []string{
		`{"exec":{"command":["a"]}}`, `{"httpGet":{"port":"web","httpHeaders":[{"name":"a"}]}}`,
		`{"sleep":{"seconds":1}}`, `{`, `null`, `[]`, `{"httpGet":null}`,
	} {
		f.Add(s, `[{"name":"web","containerPort":80}]`)
	}
	f.Fuzz(func(t *testing.T, hook, ports string) {
		h, err := hooks.RecordedPreStop(map[string]string{criclone.AnnotationPreStop: hook,
			criclone.AnnotationPorts: ports})
		if h != nil && (err != nil || h.GetAction() == nil) {
			t.Errorf("hook %v with error %v", h, err)
		}
	})
}
