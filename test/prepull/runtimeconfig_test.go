// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// httpProxy is one that knows one name, which nobody else knows, and wants a password.
type httpProxy struct {
	addr  string
	to    atomic.Pointer[front]
	asked atomic.Int64
	// unauthenticated counts requests without the password.
	unauthenticated atomic.Int64
}

func newHTTPProxy(t *testing.T) *httpProxy {
	t.Helper()
	p := &httpProxy{}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	p.addr = l.Addr().String()
	forward := &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: p.to.Load().addr}) },
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) {},
	}
	//nolint:gosec // clients are our own
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.asked.Add(1)
		login := &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
		if _, secret, _ := login.BasicAuth(); secret != password {
			p.unauthenticated.Add(1)
			http.Error(w, "who are you?", http.StatusProxyAuthRequired)
			return
		}
		if r.URL.Host != "behind-the-proxy.test:5000" {
			http.Error(w, r.URL.Host+" is not known here", http.StatusBadGateway)
			return
		}
		forward.ServeHTTP(w, r)
	})}
	var served sync.WaitGroup
	served.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		served.Wait()
	})
	return p
}

// reconfigure is another start of containerd, with other settings: the proxy sees that by itself.
func reconfigure(t *testing.T, edit func(string) string) {
	t.Helper()
	b, err := os.ReadFile(bed.ContainerdConfigFile())
	must(t, err)
	must(t, os.WriteFile(bed.ContainerdConfigFile(), []byte(edit(string(b))), 0o600))
	must(t, bed.RestartContainerd(t.Context()))
	must(t, bed.WaitProxyReady(t.Context()))
}

// limitedPull pushes an image and pulls it with a speed limit, which must be kept, through the
// front.
func limitedPull(t *testing.T, image string, f *front) {
	t.Helper()
	const limit = 6 * mib
	p := push(t, image[strings.Index(image, "/")+1:], 3, 4)
	op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image, BytesPerSecond: limit}))
	fetchedOnce(t, f, p)
	took := op.GetFinishTime().AsTime().Sub(op.GetStartTime().AsTime())
	rate := float64(p.size) / took.Seconds()
	t.Logf("%.1f MiB in %s, %.1f MiB/s", float64(p.size)/mib, took, rate/mib)
	if rate > 1.2*limit {
		t.Errorf("%.1f MiB/s, where %d are allowed: %v", rate/mib, limit/mib, op)
	}
}

// mirrorsAlone is a configuration of version 2 without config_path, which mirrors can be appended
// to.
func mirrorsAlone(p testbed.ContainerdPaths) string {
	p.RegistryConfig = ""
	return testbed.ContainerdV2(p)
}

// TestRuntimesOwnSettings pulls with a speed limit, for which the image is looked up and fetched
// here, on a node whose registries only containerd's own settings lead to: mirrors in a file of
// version 2, several directories, and a proxy that its environment alone has. Were they not known,
// the runtime would pull without a limit.
func TestRuntimesOwnSettings(t *testing.T) {
	proxy := newHTTPProxy(t)
	otherBed(t, testbed.Options{
		ContainerdConfig: mirrorsAlone, ProxyExtra: "images: {maxDiskPercent: 0}\n", // and no registryHostsDir
		ContainerdEnv: []string{"HTTP_PROXY=http://node:" + password + "@" + proxy.addr, "no_proxy=198.18.0.0/15"},
	})
	first := newFront(t, "unused.test")
	proxy.to.Store(newFront(t, "unused-behind.test"))

	reconfigure(t, func(config string) string {
		return config +
			fmt.Sprintf("[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"mirrored.test\"]\n  endpoint = "+
				"[\"http://%s\"]\n"+
				"[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"proxied.test\"]\n  endpoint = "+
				"[\"http://behind-the-proxy.test:5000\"]\n", first.addr)
	})
	t.Run("mirrors in version 2", func(t *testing.T) {
		limitedPull(t, "mirrored.test/own/mirrors:1", first)
		if proxy.asked.Load() != 0 {
			t.Error("through the proxy, which is not for this machine")
		}
	})
	t.Run("proxy in containerd's environment", func(t *testing.T) {
		limitedPull(t, "proxied.test/own/proxy:1", proxy.to.Load())
		if proxy.asked.Load() == 0 || proxy.unauthenticated.Load() != 0 {
			t.Errorf("the proxy was asked %d times, %d of them without its password", proxy.asked.Load(),
				proxy.unauthenticated.Load())
		}
		// The doctor says so, without the password. What else it finds on a node without kubelet
		// does not matter here.
		out, _ := ctl(t, "doctor", "--config", bed.ProxyConfig()).CombinedOutput()
		if want := "has mirrors for mirrored.test, proxied.test in that file; http through http://" + proxy.addr +
			", but for 198.18.0.0/15"; !strings.Contains(string(out), want) || strings.Contains(string(out), password) {
			t.Errorf("want %q in\n%s", want, out)
		}
	})
	t.Run("two directories", func(t *testing.T) {
		dirs := []string{t.TempDir(), t.TempDir()}
		second := newFront(t, "unused-second.test")
		for i, f := range []*front{first, second} {
			dir := filepath.Join(dirs[i], fmt.Sprintf("directory-%d.test", i))
			must(t, os.MkdirAll(dir, 0o755))
			must(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", f.addr),
				0o644))
		}
		reconfigure(t, func(config string) string {
			config, _, _ = strings.Cut(config, "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors")
			// containerd's transfer service takes several directories for one (containerd issue
			// 12808).
			return strings.Replace(config, "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n",
				"[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \""+
					strings.Join(dirs, ":")+"\"\n", 1) +
				"[plugins.\"io.containerd.cri.v1.images\"]\n  use_local_image_pull = true\n"
		})
		for i, f := range []*front{first, second} {
			f.bytes.Store(0)
			limitedPull(t, fmt.Sprintf("directory-%d.test/own/directory:%d", i, i), f)
		}
	})
}

// TestOwnSettingsOfContainerd17: its file has TLS for a mirror, too.
func TestOwnSettingsOfContainerd17(t *testing.T) {
	otherBed(t, testbed.Options{Containerd17: true, ContainerdConfig: mirrorsAlone,
		ProxyExtra: "images: {maxDiskPercent: 0}\n"})
	f := newFront(t, "unused17.test")
	secure := httptest.NewTLSServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: f.addr}))
	defer secure.Close()
	addr := secure.Listener.Addr().String()
	reconfigure(t, func(config string) string {
		return config +
			fmt.Sprintf("[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"secure.test\"]\n  endpoint = "+
				"[\"https://%[1]s\"]\n"+
				"[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"%[1]s\".tls]\n"+
				"  insecure_skip_verify = true\n",
				addr)
	})
	limitedPull(t, "secure.test/own/tls:1", f)
}

// asKubelet, set to a socket, has this binary be a kubelet as far as it is looked at: it has
// dialled, and has arguments and an environment.
const asKubelet = "PREPULL_AS_KUBELET"

func beKubelet(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conn.Close()
	fmt.Println("connected")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// startKubelet starts one, which ends with the test.
func startKubelet(t *testing.T, args []string, environ ...string) {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	name := filepath.Join(t.TempDir(), "kubelet")
	must(t, os.Symlink(exe, name))
	cmd := exec.Command(name, args...)
	cmd.Env = append(environ, asKubelet+"="+bed.ProxySocket, "PATH="+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0")
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	line := make([]byte, len("connected\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "connected\n" {
		t.Fatalf("%q %v", line, err)
	}
}

// TestLikeKubelet: credential provider plugins have kubelet's environment, and images are pulled up
// to kubelet's own threshold.
func TestLikeKubelet(t *testing.T) {
	dir := t.TempDir()
	const version = "credentialprovider.kubelet.k8s.io/v1"
	script := fmt.Sprintf(
		"#!/bin/sh\nprintf "+
			"'{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":%q,\"cacheKeyType\":\"Registry\","+
			"\"auth\":{\"*.like-kubelet.test\":{\"username\":\"robot\",\"password\":\"%%s\"}}}' \"$CLOUD_PASSWORD\"\n",
		version)
	must(t, os.WriteFile(filepath.Join(dir, "cloud"), []byte(script), 0o700)) //nolint:gosec // a program
	providers, config := filepath.Join(dir, "providers.yaml"), filepath.Join(dir, "kubelet.yaml")
	must(t, os.WriteFile(providers,
		fmt.Appendf(nil, "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"+
			"- {name: cloud, matchImages: ['*.like-kubelet.test'], defaultCacheDuration: 0s, "+
			"apiVersion: %s}\n", version),
		0o600))
	threshold := func(percent int) {
		t.Helper()
		must(t, os.WriteFile(config, fmt.Appendf(nil, "kind: KubeletConfiguration\nimageGCHighThresholdPercent: %d\n",
			percent), 0o600))
	}
	threshold(100)
	restart := func(maxDiskPercent string) {
		t.Helper()
		must(t, bed.KillProxy(t.Context(), syscall.SIGTERM))
		must(t, bed.StartProxy(t.Context(), "--image-credential-provider-config", providers,
			"--image-credential-provider-bin-dir", dir, "--images-max-disk-percent", maxDiskPercent))
	}
	restart("0") // without a kubelet its default counts, and this machine's disk may be as full as that
	defer func() {
		must(t, bed.KillProxy(t.Context(), syscall.SIGTERM))
		must(t, bed.StartProxy(t.Context()))
	}()
	f := newFront(t, "eu.like-kubelet.test")
	p := push(t, "like/app:1", 1, 1)
	f.protect("robot", password)
	request := func() *opsv1.PullRequest { return &opsv1.PullRequest{Image: f.image(p.name), MaxAttempts: 1} }
	fails(t, begin(t, request()), "Unauthorized") // nobody has the password

	restart("kubelet")
	startKubelet(t, []string{"--config=" + config}, "CLOUD_PASSWORD="+password)
	threshold(1)
	if op := fails(t, begin(t, request()), "DiskPressure"); !strings.Contains(op.GetMessage(),
		"kubelet removes images from 1 % on") {
		t.Errorf("%v", op)
	}
	threshold(100)
	succeeds(t, begin(t, request()))
	must(t, secretsLeft())
}
