// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/goleak"

	"github.com/cri-proxy/cri-proxy/internal/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		// want are the lines of the error, in order.
		want []string
	}{
		{"empty", "", nil},
		{"comment", "# nothing\n", nil},
		{"null keeps defaults", "stateDir:\nlisten:\n", nil},
		{"unknown key", "listn:\n  path: /x\n", []string{`f.yaml:1:1: unknown key "listn", did you mean "listen"?`}},
		{"unknown key in another case", "statedir: /x\n",
			[]string{`f.yaml:1:1: unknown key "statedir", did you mean "stateDir"?`}},
		{"unknown nested key", "log:\n  lvel: debug\n",
			[]string{`f.yaml:2:3: unknown key "log.lvel", did you mean "log.level"?`}},
		{"unknown key near none", "log:\n  zzz: debug\n",
			[]string{`f.yaml:2:3: unknown key "log.zzz"; valid keys of log: level, format`}},
		{"flag-only setting", "recordCalls: /x\n",
			[]string{`f.yaml:1:1: unknown key "recordCalls"; valid keys: listen, runtimeEndpoint`}},
		{"twice", "stateDir: /a\n\nstateDir: /b\n", []string{"f.yaml:3:1: stateDir: already set in line 1"}},
		{"mapping for a string", "stateDir:\n  a: b\n",
			[]string{"f.yaml:2:3: stateDir: want a string, got keys and values"}},
		{"string for a mapping", "log: debug\n", []string{`f.yaml:1:6: log: want keys and values, got "debug"`}},
		{"list for everything", "- a\n", []string{"f.yaml:1:1: the configuration: want keys and values, got a list"}},
		{"string for a list", "ops:\n  allowedClients: a\n",
			[]string{`f.yaml:2:19: ops.allowedClients: want a list, got "a"`}},
		{"list in a list", "ops:\n  allowedClients: [a, [b]]\n",
			[]string{"f.yaml:2:23: ops.allowedClients[1]: want a string, got a list"}},
		{"a word for a switch", "images: {verifyAccess: yes}\n",
			[]string{`f.yaml:1:24: images.verifyAccess: want true or false, got "yes"`}},
		{"words for numbers", "images: {parallel: two, maxDiskPercent: .nan}\n",
			[]string{`f.yaml:1:20: images.parallel: want a whole number, got "two"`,
				`f.yaml:1:41: images.maxDiskPercent: want a number, or kubelet, got ".nan"`}},
		{"number for a duration", "drainTimeout: 30\n",
			[]string{`f.yaml:1:15: drainTimeout: want a duration such as 30m or 90s, got "30"`}},
		{"bad duration", "drainTimeout: soon\n",
			[]string{`f.yaml:1:15: drainTimeout: want a duration such as 30m or 90s, got "soon"`}},
		{"bad mode", "listen: {mode: \"0800\"}\n",
			[]string{`f.yaml:1:16: listen.mode: mode "0800": want octal digits such as 0600`}},
		{"decimal mode", "listen: {mode: 0800}\n",
			[]string{`f.yaml:1:16: listen.mode: want octal digits such as "0600", got "0800"`}},
		{"mode beyond permissions", "listen: {mode: \"4755\"}\n",
			[]string{"f.yaml:1:16: listen.mode: mode 4755: a socket takes permission bits only"}},
		{"all errors at once", "a: 1\nb: 2\n", []string{`f.yaml:1:1: unknown key "a"`, `f.yaml:2:1: unknown key "b"`}},
		{"second document", "log: {level: info}\n---\nlog: {}\n", []string{"f.yaml:2:1: a second document"}},
		{"no yaml", "log: [\n", []string{"f.yaml: yaml: "}},
		{"new name of a key", "takeoverDrainTimeout: 1m\n", nil},
		{"both names of a key", "upgradeDrainTimeout: 1m\ntakeoverDrainTimeout: 1m\n",
			[]string{"f.yaml:2:1: takeoverDrainTimeout: already set in line 1"}},
		{"a slip in a new name", "takeoverDrainTimout: 1m\n",
			[]string{`f.yaml:1:1: unknown key "takeoverDrainTimout", did you mean "takeoverDrainTimeout"?`}},
		{"merge key", "log:\n  <<: {level: debug}\n", []string{`f.yaml:2:3: unknown key "log.<<"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := config.Parse("f.yaml", []byte(tt.text), config.Default())
			if len(tt.want) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatalf("no error, want %q", tt.want)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(tt.want) {
				t.Fatalf("got\n%v\nwant %d lines", err, len(tt.want))
			}
			for i, want := range tt.want {
				if !strings.HasPrefix(lines[i], want) {
					t.Errorf("got  %s\nwant %s", lines[i], want)
				}
			}
		})
	}
}

func TestParseValues(t *testing.T) {
	c := config.Default()
	text := `
listen: {path: /l.sock, mode: 0660, owner: 42, group: docker}
runtimeEndpoint: /r.sock
stateDir: /s
adminSocket: &a /a.sock
log: {level: debug, format: json}
metricsAddress: :9090
nodeName: 007
ops:
  address: :9443
  enrol: {kubeconfig: /kubelet.conf, namespace: elsewhere}
  certFile: c
  keyFile: k
  clientCAFile: ca
  allowedClients: [one, *a]
restart: {method: pidfd, cdiSpecDir: /cdi}
images: {parallel: 2, bytesPerSecond: 3, maxDiskPercent: 4.5, verifyAccess: true, registryHostsDir: /hosts, credentialProviderConfig: /p.yaml, credentialProviderBinDir: /p}
kubelet: {podsSocket: /k.sock}
tracing: {endpoint: c:4317, samplingRatePerMillion: 5}
drainTimeout: 1m30s
upgradeDrainTimeout: 1h
`
	if err := config.Parse("f.yaml", []byte(text), c); err != nil {
		t.Fatal(err)
	}
	want := &config.Config{
		Listen:          config.Listen{Path: "/l.sock", Mode: 0o660, Owner: "42", Group: "docker"},
		RuntimeEndpoint: "/r.sock",
		StateDir:        "/s",
		AdminSocket:     "/a.sock",
		Log:             config.Log{Level: "debug", Format: "json"},
		MetricsAddress:  ":9090",
		NodeName:        "007",
		Ops: config.Ops{Address: ":9443",
			Enrol: config.Enrol{Kubeconfig: "/kubelet.conf", Namespace: "elsewhere"}, CertFile: "c", KeyFile: "k",
			ClientCAFile: "ca", AllowedClients: []string{"one", "/a.sock"}},
		Restart: config.Restart{Method: "pidfd", CDISpecDir: "/cdi"},
		Images: config.Images{Parallel: 2, BytesPerSecond: 3, MaxDiskPercent: 4.5, VerifyAccess: true,
			RegistryHostsDir: "/hosts", CredentialProviderConfig: "/p.yaml", CredentialProviderBinDir: "/p"},
		Kubelet:      config.Kubelet{PodsSocket: "/k.sock"},
		Tracing:      config.Tracing{Endpoint: "c:4317", SamplingRatePerMillion: 5},
		DrainTimeout: 90 * time.Second,

		TakeoverDrainTimeout: time.Hour,
	}
	if !reflect.DeepEqual(c, want) {
		t.Fatalf("got  %+v\nwant %+v", c, want)
	}
}

// The version before reads what this one writes.
func TestRenamedKey(t *testing.T) {
	c := config.Default()
	if err := config.Parse("f.yaml", []byte("takeoverDrainTimeout: 2h\n"), c); err != nil ||
		c.TakeoverDrainTimeout != 2*time.Hour {
		t.Errorf("%s, %v", c.TakeoverDrainTimeout, err)
	}
	b, err := c.YAML()
	if err != nil || !strings.Contains(string(b), "\nupgradeDrainTimeout: 2h0m0s\n") ||
		strings.Contains(string(b), "takeover") {
		t.Errorf("%v\n%s", err, b)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("log: {level: debug}\n"))
	f.Add([]byte("listen:\n  mode: 0640\nops: {allowedClients: [a, b]}\ndrainTimeout: 3s\n"))
	f.Add([]byte("a: &x [*x]\n---\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := config.Default()
		if config.Parse("f", text, c) != nil {
			return
		}
		printed, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again := config.Default()
		if err := config.Parse("printed", printed, again); err != nil {
			t.Fatalf("%v in\n%s", err, printed)
		}
		if reprinted, _ := again.YAML(); string(reprinted) != string(printed) {
			t.Fatalf("printed\n%s\nread back\n%s", printed, reprinted)
		}
	})
}

func TestFlagsWin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	text := "stateDir: /file\nadminSocket: /file.sock\nlisten: {mode: \"0660\", path: /file/l.sock}\nops: " +
		"{allowedClients: [file]}\ndrainTimeout: 1s\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	c.Flags(fs)
	if err := fs.Parse([]string{"--state-dir=/flag", "--listen-mode=0600", "--ops-allowed-clients=a,b",
		"--drain-timeout=2s", "--log-level=debug"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Load(file, fs); err != nil {
		t.Fatal(err)
	}
	if c.StateDir != "/flag" || c.Listen.Mode != 0o600 ||
		!reflect.DeepEqual(c.Ops.AllowedClients, []string{"a", "b"}) || c.DrainTimeout != 2*time.Second ||
		c.Log.Level != "debug" {
		t.Errorf("flags lost: %+v", c)
	}
	if c.AdminSocket != "/file.sock" || c.Listen.Path != "/file/l.sock" {
		t.Errorf("file lost: %+v", c)
	}
}

func TestLoadErrorsAreForThePersonAtTheCommandLine(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("x: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{bad, filepath.Join(dir, "none.yaml")} {
		err := config.Default().Load(file, nil)
		var invalid *config.InvalidError
		if !errors.As(err, &invalid) || invalid.ExitCode() != 2 || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestPrintedConfigurationIsReadBack(t *testing.T) {
	c := config.Default()
	c.Ops.AllowedClients = []string{"a", "b: c", "true"}
	c.NodeName = "0600"
	b, err := c.YAML()
	if err != nil {
		t.Fatal(err)
	}
	got := &config.Config{}
	if err := config.Parse("f", b, got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, c) {
		t.Fatalf("got  %+v\nwant %+v\n%s", got, c, b)
	}
}

func TestExampleFile(t *testing.T) {
	c := config.Default()
	if err := c.Load("../../systemd/config.yaml", nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.DrainTimeout = 20 * time.Second // the one it says differs
	want.Ops.AllowedClients = []string{}
	c.File, c.FileSHA256 = "", ""
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	long := "/" + strings.Repeat("a", 107)
	for _, tt := range []struct {
		name   string
		change func(*config.Config)
		want   string // part of the error; empty: none
	}{
		{"default", func(*config.Config) {}, ""},
		{"pulls at once", func(c *config.Config) { c.Images.Parallel = 0 }, "images.parallel: 0; want 1 to 16"},
		{"negative speed", func(c *config.Config) { c.Images.BytesPerSecond = -1 },
			"images.bytesPerSecond: -1 is negative"},
		{"full disk", func(c *config.Config) { c.Images.MaxDiskPercent = 101 }, "images.maxDiskPercent: 101; want 0"},
		{"negative disk", func(c *config.Config) { c.Images.MaxDiskPercent = -2 }, "images.maxDiskPercent: -2; want 0"},
		{"relative hosts", func(c *config.Config) { c.Images.RegistryHostsDir = "certs.d" },
			"images.registryHostsDir: \"certs.d\" is not an absolute path"},
		{"plugins", func(c *config.Config) {
			c.Images.CredentialProviderConfig, c.Images.CredentialProviderBinDir = "/c", "/p"
		}, ""},
		{"plugins without a directory", func(c *config.Config) { c.Images.CredentialProviderConfig = "/c" },
			"credentialProviderConfig and credentialProviderBinDir go together"},
		{"relative plugins", func(c *config.Config) {
			c.Images.CredentialProviderConfig, c.Images.CredentialProviderBinDir = "/c", "p"
		}, "images.credentialProviderBinDir: \"p\" is not an absolute path"},
		{"longest path", func(c *config.Config) { c.Listen.Path = long[:107] }, ""},
		{"long listen path", func(c *config.Config) { c.Listen.Path = long }, "listen.path: \"/aaa"},
		{"long admin socket", func(c *config.Config) { c.AdminSocket = long },
			"is 108 bytes long, a socket path takes at most 107; choose a shorter one"},
		{"long endpoint", func(c *config.Config) { c.RuntimeEndpoint = "unix://" + long }, "runtimeEndpoint: "},
		{"relative listen path", func(c *config.Config) { c.Listen.Path = "x.sock" },
			`listen.path: "x.sock" is not an absolute path`},
		{"no listen path", func(c *config.Config) { c.Listen.Path = "" }, "listen.path: empty"},
		{"tcp endpoint", func(c *config.Config) { c.RuntimeEndpoint = "tcp://1.2.3.4:5" }, "want unix:///path/to.sock"},
		{"endpoint as a path", func(c *config.Config) { c.RuntimeEndpoint = "/run/x.sock" }, ""},
		{"loop", func(c *config.Config) { c.Listen.Path = "/run/containerd/containerd.sock" },
			"calls would go round in a loop"},
		{"loop in other words", func(c *config.Config) {
			c.Listen.Path, c.RuntimeEndpoint = "/x//y/../z.sock", "unix:///x/z.sock"
		}, "calls would go round in a loop"},
		{"loop through a symlink", func(c *config.Config) {
			c.Listen.Path, c.RuntimeEndpoint = filepath.Join(link, "c.sock"), filepath.Join(dir, "c.sock")
		}, "calls would go round in a loop"},
		{"cri-o suffix", func(c *config.Config) { c.Listen.Path = "/var/run/crio/crio.sock" }, "legacy stats"},
		{"admin socket is the cri socket", func(c *config.Config) { c.AdminSocket = c.Listen.Path },
			"give the ops API a socket of its own"},
		{"admin socket is the runtime's", func(c *config.Config) { c.AdminSocket = "/run/containerd/containerd.sock" },
			"give the ops API a socket of its own"},
		{"mode for nobody", func(c *config.Config) { c.Listen.Mode = 0o060 }, "keeps the owner itself from connecting"},
		{"mode for everybody", func(c *config.Config) { c.Listen.Mode = 0o666 },
			"lets every user of this machine create containers as root"},
		{"owner by number", func(c *config.Config) { c.Listen.Owner, c.Listen.Group = "12345", "54321" }, ""},
		{"owner by name", func(c *config.Config) { c.Listen.Owner, c.Listen.Group = "root", "root" }, ""},
		{"unknown owner", func(c *config.Config) { c.Listen.Owner = "no-such-user" },
			"listen.owner: user: unknown user no-such-user"},
		{"unknown group", func(c *config.Config) { c.Listen.Group = "no-such-group" },
			"listen.group: group: unknown group no-such-group"},
		{"state directory", func(c *config.Config) { c.StateDir = "state" },
			"stateDir: \"state\" is not an absolute path"},
		{"log level", func(c *config.Config) { c.Log.Level = "loud" }, "want trace, debug"},
		{"log format", func(c *config.Config) { c.Log.Format = "xml" }, "want text or json"},
		{"metrics without port", func(c *config.Config) { c.MetricsAddress = "localhost" },
			"metricsAddress: \"localhost\": want host:port"},
		{"metrics with a word for a port", func(c *config.Config) { c.MetricsAddress = "localhost:http" },
			"is no number up to 65535"},
		{"metrics with a large port", func(c *config.Config) { c.MetricsAddress = ":65536" },
			"is no number up to 65535"},
		{"metrics", func(c *config.Config) { c.MetricsAddress = "[::1]:0" }, ""},
		{"negative drain", func(c *config.Config) { c.DrainTimeout = -1 }, "drainTimeout: -1ns is negative"},
		{"negative drain after an upgrade", func(c *config.Config) { c.TakeoverDrainTimeout = -1 },
			"upgradeDrainTimeout: -1ns is negative"},
		{"ops", func(c *config.Config) {
			c.Ops = config.Ops{Address: ":1", CertFile: "a", KeyFile: "b", ClientCAFile: "c",
				AllowedClients: []string{"d"}}
		}, ""},
		{"ops without certificates", func(c *config.Config) {
			c.Ops = config.Ops{Address: ":1", AllowedClients: []string{"d"}}
		}, "ops.certFile: empty; the ops API over TCP speaks mutual TLS only"},
		{"ops by enrolment", func(c *config.Config) {
			c.Ops.Address, c.Ops.Enrol.Kubeconfig = ":1", "/etc/kubernetes/kubelet.conf"
		}, ""},
		{"ops by enrolment and from files", func(c *config.Config) {
			c.Ops.Address, c.Ops.Enrol.Kubeconfig, c.Ops.KeyFile = ":1", "/etc/kubernetes/kubelet.conf", "b"
		}, "ops: enrol.kubeconfig and certFile, keyFile or clientCAFile exclude each other"},
		{"ops by enrolment with a relative path", func(c *config.Config) {
			c.Ops.Address, c.Ops.Enrol.Kubeconfig = ":1", "kubelet.conf"
		}, `ops.enrol.kubeconfig: "kubelet.conf" is not an absolute path`},
		{"ops by enrolment without a namespace", func(c *config.Config) {
			c.Ops.Address, c.Ops.Enrol = ":1", config.Enrol{Kubeconfig: "/k", Namespace: "A/b"}
		}, `ops.enrol.namespace: "A/b" is no namespace`},
		{"enrolment without address", func(c *config.Config) { c.Ops.Enrol.Kubeconfig = "/k" },
			"ops.address: empty, so the other ops settings have no effect"},
		{"ops without clients", func(c *config.Config) {
			c.Ops = config.Ops{Address: ":1", CertFile: "a", KeyFile: "b", ClientCAFile: "c"}
		}, "ops.allowedClients: empty, so every client would be refused"},
		{"ops with an empty client", func(c *config.Config) {
			c.Ops = config.Ops{Address: ":1", CertFile: "a", KeyFile: "b", ClientCAFile: "c",
				AllowedClients: []string{""}}
		}, "ops.allowedClients: an empty name"},
		{"ops settings without address", func(c *config.Config) { c.Ops.CertFile = "a" },
			"ops.address: empty, so the other ops settings have no effect"},
		{"all errors at once", func(c *config.Config) { c.Log.Level, c.StateDir = "x", "y" },
			"absolute path\nlog.level"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := config.Default()
			tt.change(c)
			err := c.Validate()
			switch {
			case tt.want == "" && err != nil:
				t.Fatal(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Fatalf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestComplete(t *testing.T) {
	c := config.Default()
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	if c.NodeName == "" || c.NodeName != strings.ToLower(c.NodeName) {
		t.Errorf("node name %q", c.NodeName)
	}
	c.NodeName = "Given"
	if err := c.Complete(); err != nil || c.NodeName != "Given" {
		t.Errorf("node name %q, %v", c.NodeName, err)
	}
}
