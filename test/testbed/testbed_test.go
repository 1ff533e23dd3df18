// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSubnets(t *testing.T) {
	base := netip.MustParsePrefix(networkBase)
	var all []netip.Prefix
	for i := range subnetCount {
		network, gateway := subnet(i)
		if !base.Overlaps(network) || network != network.Masked() || !network.Contains(gateway) ||
			gateway == network.Addr() {
			t.Errorf("subnet %d: %s with gateway %s", i, network, gateway)
		}
		for _, other := range all {
			if other.Overlaps(network) {
				t.Errorf("%s and %s overlap", other, network)
			}
		}
		all = append(all, network)
	}
	if used, err := inUse(netip.MustParsePrefix("127.0.0.0/22")); err != nil || !used {
		t.Errorf("loopback's network counts as free (%v)", err)
	}
}

func TestOptions(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    Options
		want string
	}{
		{"zero value", Options{}, ""},
		{"too many nodes", Options{Nodes: maxNodes + 1}, "nodes asked for"},
		{"negative", Options{Nodes: -1}, "nodes asked for"},
		{"all later", Options{Nodes: 2, Later: 2}, "the first cannot"},
		{"environment without a name", Options{ContainerdEnv: []string{"HTTPS_PROXY"}}, "not NAME=value"},
		{"what containerd 1.7 loses",
			Options{Containerd17: true, ContainerdExtra: `[plugins."io.containerd.grpc.v1.cri".containerd]`},
			"ContainerdV2"},
		{"environment", Options{ContainerdEnv: []string{"HTTPS_PROXY=http://198.18.0.1:3128"}}, ""},
		{"proxy options of a direct bed", Options{Direct: true, ProxyArgs: []string{"-v"}}, "direct bed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.o.complete()
			if (err == nil) != (tc.want == "") || (err != nil && !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestMissingPackages(t *testing.T) {
	if _, err := os.Stat("/usr/bin/dpkg-query"); err != nil {
		t.Skip("not a Debian machine")
	}
	got, err := missingPackages(t.Context(), []string{"dpkg", "no-such-package-here", "libc-bin"})
	if err != nil || !slices.Equal(got, []string{"no-such-package-here"}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCacheDir(t *testing.T) {
	own, xdg, home := t.TempDir(), t.TempDir(), t.TempDir()
	for _, tc := range []struct{ name, cache, xdg, want string }{
		{"own variable", own, xdg, own},
		{"XDG", "", xdg, filepath.Join(xdg, "cri-proxy")},
		{"home", "", "", filepath.Join(home, ".cache", "cri-proxy")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("CRI_PROXY_CACHE", tc.cache)
			t.Setenv("XDG_CACHE_HOME", tc.xdg)
			t.Setenv("HOME", home)
			got, err := CacheDir()
			if err != nil || got != tc.want {
				t.Errorf("got %s, %v; want %s", got, err, tc.want)
			}
			if _, err := os.Stat(got); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSourceDir(t *testing.T) {
	root, err := SourceDir("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "test", "testbed", "doc.go")); err != nil {
		t.Error(err)
	}
	if _, err := SourceDir(t.TempDir()); err == nil || !strings.Contains(err.Error(), "Source") {
		t.Errorf("outside a checkout: %v", err)
	}
	// A component is another module: the search must go on upwards.
	if got, err := SourceDir(filepath.Join(root, "test", "components", "runc")); err != nil || got != root {
		t.Errorf("inside a component: %s, %v", got, err)
	}
}

func TestKubernetesVersionIsThePinnedOne(t *testing.T) {
	root, err := SourceDir("")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "test", "components", "kubernetes", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte("k8s.io/kubernetes "+kubernetesVersion+" ")) &&
		!bytes.Contains(b, []byte("k8s.io/kubernetes "+kubernetesVersion+"\n")) {
		t.Errorf("test/components/kubernetes/go.mod does not require k8s.io/kubernetes %s", kubernetesVersion)
	}
}

func TestEveryComponentHasAModule(t *testing.T) {
	root, err := SourceDir("")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range append(components(), containerd17()) {
		b, err := os.ReadFile(filepath.Join(root, "test", "components", c.dir, "go.mod"))
		if err != nil {
			t.Error(err)
		}
		for _, programs := range []map[string]string{c.programs, c.tests} {
			for name, pkg := range programs {
				if !bytes.Contains(b, []byte(pkg+"\n")) {
					t.Errorf("component %s: its go.mod names no tool %s for %s", c.dir, pkg, name)
				}
			}
		}
	}
}

func TestPKI(t *testing.T) {
	p, err := newPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := p.ops.issue(p.Dir, "server",
		subject{name: "node-x-0", dns: []string{"node-x-0"}, ips: ips("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		client Pair
		ok     bool
	}{
		{"cri-controller", p.Controller, true},
		{"other-client", p.OtherClient, true},
		{"cri-controller", p.Impostor, false},
	} {
		t.Run(filepath.Base(tc.client.Cert), func(t *testing.T) {
			name, err := handshake(t, server, tc.client, p.OpsCA)
			if (err == nil) != tc.ok || (tc.ok && name != tc.name) {
				t.Errorf("server sees %q, %v", name, err)
			}
		})
	}
}

// handshake returns the client's name as the server verified it.
func handshake(t *testing.T, server, client, ca Pair) (string, error) {
	t.Helper()
	load := func(p Pair) []tls.Certificate {
		c, err := tls.LoadX509KeyPair(p.Cert, p.Key)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{c}
	}
	pem, err := os.ReadFile(ca.Cert)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	// A real connection: alerts need a buffer.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialed := make(chan error, 1)
	go func() {
		d := tls.Dialer{Config: &tls.Config{Certificates: load(client), RootCAs: pool, ServerName: "node-x-0"}}
		conn, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
		if err == nil {
			defer conn.Close()
		}
		dialed <- err
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted := tls.Server(conn,
		&tls.Config{Certificates: load(server), ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
	if err := accepted.HandshakeContext(t.Context()); err != nil {
		<-dialed // TLS 1.3 clients learn of a refusal only when they read
		return "", err
	}
	return accepted.ConnectionState().PeerCertificates[0].Subject.CommonName, <-dialed
}

func TestWriteTarIsReproducible(t *testing.T) {
	entries := []tarEntry{{name: "bin/", mode: 0o755}, {name: "bin/a", data: []byte("x"), mode: 0o755},
		{name: "bin/b", link: "a"}}
	var got [2][]byte
	for i := range got {
		path := filepath.Join(t.TempDir(), "t.tar")
		if err := writeTar(path, entries); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got[i] = b
	}
	if len(got[0]) == 0 || !bytes.Equal(got[0], got[1]) {
		t.Error("two tars of the same entries differ")
	}
}

func TestMergeYAML(t *testing.T) {
	config := map[string]any{"a": 1, "b": map[string]any{"c": 2}}
	if err := mergeYAML(config, "b: {d: 3}\ne: x\n"); err != nil {
		t.Fatal(err)
	}
	if len(config) != 3 || config["a"] != 1 || config["e"] != "x" || len(config["b"].(map[string]any)) != 1 {
		t.Errorf("got %v", config)
	}
	if err := mergeYAML(config, "a: ["); err == nil {
		t.Error("broken YAML is accepted")
	}
}
