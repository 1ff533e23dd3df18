// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package runtimeconfig

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// secret is what nobody may read anywhere.
const secret = "hunter2-Zq8vKp"

// containerd is one that does nothing but listen: this process stands for it, with a procfs of the
// test's.
type containerd struct {
	dir, proc string
	words     bytes.Buffer
	version   string
	starts    int
	source    *Source
}

func newContainerd(t *testing.T) *containerd {
	t.Helper()
	c := &containerd{dir: t.TempDir(), version: "2.4.2"}
	c.proc = filepath.Join(c.dir, "proc")
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", filepath.Join(c.dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	log := logrus.New()
	log.SetOutput(&c.words)
	c.source = New(Options{Socket: filepath.Join(c.dir, "s"), Proc: c.proc, Log: log, Conn: c})
	c.start(t, []string{"/usr/bin/containerd"})
	t.Cleanup(func() {
		if strings.Contains(c.words.String(), secret) {
			t.Errorf("logged: %s", &c.words)
		}
	})
	return c
}

// start is another process of containerd.
func (c *containerd) start(t *testing.T, args []string, environ ...string) {
	t.Helper()
	c.starts++
	at := filepath.Join(c.proc, strconv.Itoa(os.Getpid()))
	if err := os.MkdirAll(at, 0o700); err != nil {
		t.Fatal(err)
	}
	list := func(s []string) string { return strings.Join(s, "\x00") + "\x00" }
	c.write(t, filepath.Join(at, "comm"), "containerd\n")
	c.write(t, filepath.Join(at, "cmdline"), list(args))
	c.write(t, filepath.Join(at, "environ"), list(environ))
	c.write(t, filepath.Join(at, "stat"), fmt.Sprintf("%d (a (b) c) S%s %d 99 99\n", os.Getpid(),
		strings.Repeat(" 1", 18), c.starts))
	if err := os.Symlink(c.dir, filepath.Join(at, "cwd")); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
}

// configured is start with a file.
func (c *containerd) configured(t *testing.T, text string) {
	t.Helper()
	c.write(t, filepath.Join(c.dir, "config.toml"), text)
	c.start(t, []string{"containerd", "--config", "config.toml"})
}

func (c *containerd) write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", c.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Invoke answers Version.
func (c *containerd) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	proto.Merge(reply.(proto.Message), &runtimeapi.VersionResponse{RuntimeName: "containerd",
		RuntimeVersion: c.version})
	return nil
}

func (*containerd) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, io.EOF
}

// reach is where a registry is reached, as scheme://host/path.
func (c *containerd) reach(t *testing.T, host string) string {
	t.Helper()
	find, err := c.source.Hosts(t.Context(), config.HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hosts, err := find(host)
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, h := range hosts {
		out = append(out, h.Scheme+"://"+h.Host+h.Path)
	}
	return strings.Join(out, " ")
}

// TestFiles reads what containerd's own tests and documentation have.
func TestFiles(t *testing.T) {
	const mirrors = `
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
  endpoint = ["https://mirror.test/v2/hub", "plain.test:5000"]
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."*"]
  endpoint = ["http://all.test"]
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."own.test"]
  endpoint = ["http://own.test", "http://other.test"]
`
	hub := "https://registry-1.docker.io/v2"
	for name, tt := range map[string]struct {
		config string
		want   map[string]string
	}{
		"version 2, mirrors": {"version = 2\n" + mirrors, map[string]string{
			"docker.io": "https://mirror.test/v2/hub https://plain.test:5000/v2 " + hub,
			"quay.io":   "http://all.test/v2 https://quay.io/v2",
			"own.test":  "http://own.test/v2 http://other.test/v2",
		}},
		"version 3, mirrors": {"version = 3\n" + strings.ReplaceAll(mirrors, criPlugin, imagesPlugin),
			map[string]string{
				"quay.io": "http://all.test/v2 https://quay.io/v2",
			}},
		"no version": {"[plugins.cri.registry.mirrors.\"quay.io\"]\nendpoint = [\"http://one.test\"]\n",
			map[string]string{
				"quay.io": "http://one.test/v2 https://quay.io/v2",
			}},
		"this machine": {"version = 2\n" + mirrors, map[string]string{
			"localhost:5000": "http://all.test/v2 http://localhost:5000/v2",
		}},
		"version 2, config_path": {"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = " +
			"\"DIR/a\"\n", map[string]string{
			"one.test": "http://a.test/v2 https://one.test/v2", "both.test": "http://a.test/v2 https://both.test/v2",
			"two.test": "https://two.test/v2",
		}},
		"version 3, two directories": {"version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path " +
			"= \"DIR/none:DIR/a:DIR/b\"\n", map[string]string{
			"one.test": "http://a.test/v2 https://one.test/v2", "both.test": "http://a.test/v2 https://both.test/v2",
			"two.test": "http://b.test/v2 https://two.test/v2",
		}},
		"imports": {"version = 2\nimports = [\"conf.d/*.toml\"]\n" + mirrors, map[string]string{
			"imported.test": "http://imported-mirror.test/v2 https://imported.test/v2",
			"docker.io":     "https://mirror.test/v2/hub https://plain.test:5000/v2 " + hub,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainerd(t)
			for dir, hosts := range map[string][]string{"a": {"one.test", "both.test"},
				"b": {"two.test", "both.test"}} {
				for _, host := range hosts {
					c.write(t, filepath.Join(c.dir, dir, host, "hosts.toml"),
						"server = \"https://"+host+"\"\n[host.\"http://"+dir+".test\"]\n")
				}
			}
			c.write(t, filepath.Join(c.dir, "conf.d", "x.toml"),
				"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"imported.test\"]\nendpoint = "+
					"[\"http://imported-mirror.test\"]\n")
			c.configured(t, tt.config)
			for host, want := range tt.want {
				if got := c.reach(t, host); got != want {
					t.Errorf("%s: %s, want %s", host, got, want)
				}
			}
			if c.words.Len() > 0 {
				t.Error(c.words.String())
			}
		})
	}
}

// TestExplicitDirectoryWins: what we were told counts, and containerd's mirrors do not.
func TestExplicitDirectoryWins(t *testing.T) {
	c := newContainerd(t)
	c.configured(t, "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"*\"]\nendpoint = "+
		"[\"http://mirror.test\"]\n")
	c.write(t, filepath.Join(c.dir, "ours", "one.test", "hosts.toml"), "server = \"http://ours.test\"\n")
	c.source.o.HostsDir = filepath.Join(c.dir, "ours")
	if got, want := c.reach(t, "one.test"), "http://ours.test/v2"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestDefaults: containerd 2 has directories by default, and 1.7 has none.
func TestDefaults(t *testing.T) {
	for version, want := range map[string][]string{"2.4.2": {"/etc/containerd/certs.d", "/etc/docker/certs.d"},
		"v2.1.0-rc.1": {"/etc/containerd/certs.d", "/etc/docker/certs.d"}, "v1.7.35": nil} {
		c := newContainerd(t)
		c.version = version
		c.configured(t, "version = 2\n")
		s, err := c.source.Look(t.Context())
		if err != nil || !slices.Equal(s.Dirs, want) {
			t.Errorf("%s: %v %v", version, s, err)
		}
	}
}

// TestChanges: the file counts from containerd's next start on, as for containerd, and what is
// below config_path at once.
func TestChanges(t *testing.T) {
	c := newContainerd(t)
	file := func(dir string) string {
		return "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"DIR/" + dir + "\"\n"
	}
	hosts := func(dir, server string) {
		c.write(t, filepath.Join(c.dir, dir, "one.test", "hosts.toml"), "server = \"http://"+server+"\"\n")
	}
	want := func(want string) {
		t.Helper()
		if got := c.reach(t, "one.test"); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	hosts("a", "a.test")
	hosts("b", "b.test")
	c.configured(t, file("a"))
	want("http://a.test/v2")
	hosts("a", "again.test")
	want("http://again.test/v2")
	c.write(t, filepath.Join(c.dir, "config.toml"), file("b"))
	want("http://again.test/v2")
	c.configured(t, file("b"))
	want("http://b.test/v2")
}

// TestProxies go through what containerd's environment has, and not ours.
func TestProxies(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://cri-proxys-own.test:1")
	for name, tt := range map[string]struct {
		environ   []string
		url, want string
	}{
		"https": {[]string{"HTTPS_PROXY=http://u:" + secret + "@proxy.test:3128"},
			"https://r.test/v2/", "http://u:" + secret + "@proxy.test:3128"},
		"lower case": {[]string{"https_proxy=proxy.test:3128"}, "https://r.test/v2/",
			"http://proxy.test:3128"},
		"upper first": {[]string{"https_proxy=http://lower.test", "HTTPS_PROXY=http://upper.test"},
			"https://r.test/v2/", "http://upper.test"},
		"http": {[]string{"HTTP_PROXY=http://proxy.test:3128"}, "http://r.test/v2/",
			"http://proxy.test:3128"},
		"other scheme": {[]string{"HTTP_PROXY=http://proxy.test:3128"}, "https://r.test/v2/", ""},
		"excluded": {[]string{"HTTPS_PROXY=http://proxy.test:3128", "NO_PROXY=10.0.0.0/8,.test"},
			"https://r.test/v2/", ""},
		"excluded, lower case": {[]string{"HTTPS_PROXY=http://proxy.test:3128", "no_proxy=r.test"},
			"https://r.test/v2/", ""},
		"none": {nil, "https://r.test/v2/", ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, file := range []string{"version = 3\n",
				"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"*\"]\nendpoint = " +
					"[\"http://mirror.test\"]\n"} {
				c := newContainerd(t)
				c.write(t, filepath.Join(c.dir, "config.toml"), file)
				c.start(t, []string{"containerd", "-c=config.toml"}, tt.environ...)
				asked := 0
				find, err := c.source.Hosts(t.Context(),
					config.HostOptions{UpdateClient: func(*http.Client) error { asked++; return nil }})
				if err != nil {
					t.Fatal(err)
				}
				hosts, err := find("r.test")
				if err != nil || len(hosts) == 0 || asked == 0 {
					t.Fatal(hosts, err, asked)
				}
				target, err := url.Parse(tt.url)
				if err != nil {
					t.Fatal(err)
				}
				for _, h := range hosts {
					proxy, err := h.Client.Transport.(*http.Transport).Proxy(&http.Request{URL: target})
					got := ""
					if proxy != nil {
						got = proxy.String()
					}
					if err != nil || got != tt.want {
						t.Errorf("%s: %q %v, want %q", h.Host, got, err, tt.want)
					}
				}
				s, err := c.source.Look(t.Context())
				if err != nil || strings.Contains(s.String()+fmt.Sprintf("%+v", s), secret) {
					t.Errorf("%v %v", s, err)
				}
			}
		})
	}
}

// TestCredentialsAndHeaders of the file go to the registry when the pull brings no credentials, and
// those of the pull when it does.
func TestCredentialsAndHeaders(t *testing.T) {
	encoded := base64.StdEncoding.EncodeToString([]byte("encoded:" + secret))
	for name, tt := range map[string]struct {
		config, own, want string
	}{
		"name": {"configs.\"HOST\".auth = {username = \"me\", password = \"" + secret + "\"}", "", "me:" +
			secret},
		"encoded": {"configs.\"HOST\".auth = {auth = \"" + encoded + "\"}", "", "encoded:" + secret},
		"older": {"auths.\"http://HOST\" = {username = \"old\", password = \"" + secret + "\"}", "", "old:" +
			secret},
		"of the pull": {"configs.\"HOST\".auth = {username = \"me\", password = \"" + secret + "\"}", "pull",
			"pull:" + secret},
		"none": {"", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got, header string
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				user, password, ok := r.BasicAuth()
				if !ok {
					w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
					http.Error(w, "no", http.StatusUnauthorized)
					return
				}
				got, header = user+":"+password, r.Header.Get("X-Meta")
			}))
			defer server.Close()
			host := strings.TrimPrefix(server.URL, "http://")
			c := newContainerd(t)
			c.configured(t, strings.ReplaceAll("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n"+
				"mirrors.\"r.test\".endpoint = [\"http://HOST\"]\nheaders.\"X-Meta\" = [\"yes\"]\n"+tt.config+"\n",
				"HOST", host))
			options := config.HostOptions{}
			if tt.own != "" {
				options.Credentials = func(string) (string, string, error) { return tt.own, secret, nil }
			}
			find, err := c.source.Hosts(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			hosts, err := find("r.test")
			if err != nil || len(hosts) != 2 || hosts[0].Header.Get("X-Meta") != "yes" {
				t.Fatal(hosts, err)
			}
			for range 2 { // the second with what the first answer asks for
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/v2/", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header = hosts[0].Header.Clone()
				if err := hosts[0].Authorizer.Authorize(t.Context(), req); err != nil {
					t.Fatal(err)
				}
				resp, err := hosts[0].Client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode == http.StatusUnauthorized {
					if err := hosts[0].Authorizer.AddResponses(t.Context(), []*http.Response{resp}); err != nil {
						break // there is nothing to answer with
					}
				}
			}
			hosts[0].Client.CloseIdleConnections()
			if got != tt.want || tt.want != "" && header != "yes" {
				t.Errorf("%q, header %q", got, header)
			}
		})
	}
}

// TestTLS of the file counts with containerd 1.7, and with no later one.
func TestTLS(t *testing.T) {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	server.Config.ErrorLog = nil
	host := strings.TrimPrefix(server.URL, "https://")
	for version, want := range map[string]bool{"v1.7.35": true, "2.4.2": false} {
		c := newContainerd(t)
		c.version = version
		c.configured(t, strings.ReplaceAll("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n"+
			"mirrors.\"r.test\".endpoint = [\"https://HOST\"]\nconfigs.\"HOST\".tls.insecure_skip_verify = true\n",
			"HOST", host))
		find, err := c.source.Hosts(t.Context(), config.HostOptions{})
		if err != nil {
			t.Fatal(err)
		}
		hosts, err := find("r.test")
		if err != nil {
			t.Fatal(err)
		}
		if got := hosts[0].Client.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify; got != want {
			t.Errorf("%s: verified %v", version, !got)
		}
	}
}

// TestUnknown: where containerd cannot be asked, the registries are reached as before, that is said
// once, and tried again.
func TestUnknown(t *testing.T) {
	c := newContainerd(t)
	stat := filepath.Join(c.proc, strconv.Itoa(os.Getpid()))
	for name, spoil := range map[string]func(){
		"another program":    func() { c.start(t, nil); c.write(t, filepath.Join(stat, "comm"), "crio\n") },
		"no such file":       func() { c.start(t, []string{"containerd", "--config", "/nowhere.toml"}) },
		"no TOML":            func() { c.configured(t, "x = \""+secret+"\nversion") },
		"of a later version": func() { c.configured(t, "version = 99\n") },
		"not to be read":     func() { c.start(t, nil); os.Remove(filepath.Join(stat, "cmdline")) },
	} {
		t.Run(name, func(t *testing.T) {
			c.words.Reset()
			spoil()
			for range 2 {
				if got, want := c.reach(t, "one.test"), "https://one.test/v2"; got != want {
					t.Errorf("%s, want %s", got, want)
				}
			}
			if n := strings.Count(c.words.String(), "are not known"); n != 1 {
				t.Errorf("said %d times: %s", n, &c.words)
			}
			c.configured(t, "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"*\"]\nendpoint = "+
				"[\"http://mirror.test\"]\n")
			if got, want := c.reach(t, "one.test"), "http://mirror.test/v2 https://one.test/v2"; got != want {
				t.Errorf("afterwards %s, want %s", got, want)
			}
		})
	}
}

// TestUnknownEnvironment: the registries of a containerd count whose proxies are not known.
func TestUnknownEnvironment(t *testing.T) {
	c := newContainerd(t)
	c.configured(t, "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"*\"]\nendpoint = "+
		"[\"http://mirror.test\"]\n")
	at := filepath.Join(c.proc, strconv.Itoa(os.Getpid()))
	c.write(t, filepath.Join(at, "cmdline"), "containerd\x00--config\x00DIR/config.toml\x00")
	if err := errors.Join(os.Remove(filepath.Join(at, "environ")), os.Remove(filepath.Join(at, "cwd"))); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got, want := c.reach(t, "one.test"), "http://mirror.test/v2 https://one.test/v2"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if n := strings.Count(c.words.String(), "environment is not known"); n != 1 {
		t.Errorf("said %d times: %s", n, &c.words)
	}
	s, err := c.source.Look(t.Context())
	if err != nil || !strings.Contains(s.String(),
		"has mirrors for * in that file; whether through a proxy is not known (") {
		t.Errorf("%v, %v", s, err)
	}
}

func TestConfigFile(t *testing.T) {
	for line, want := range map[string]string{
		"":                            "/etc/containerd/config.toml false",
		"--config /a.toml":            "/a.toml true",
		"--config=/a.toml":            "/a.toml true",
		"-config /a.toml -l debug":    "/a.toml true",
		"-c /a.toml -a /x.sock":       "/a.toml true",
		"-c=/a.toml --config=/b.toml": "/b.toml true",
		"--log-level debug":           "/etc/containerd/config.toml false",
		"-c":                          "/etc/containerd/config.toml false",
	} {
		file, told := configFile(strings.Fields(line))
		if got := fmt.Sprint(file, " ", told); got != want {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
}

func TestBare(t *testing.T) {
	for proxy, want := range map[string]string{
		"": "", "http://u:" + secret + "@p.test:3128/x?y=" + secret: "http://p.test:3128", "https://" + secret +
			"@p.test": "https://p.test",
		"p.test:3128": "http://p.test:3128", "u:" + secret + "@p.test:3128": "http://p.test:3128", "http://" +
			secret + " x@[": "not shown: no URL",
	} {
		if got := bare(proxy); got != want {
			t.Errorf("%s: %s, want %s", proxy, got, want)
		}
	}
}
