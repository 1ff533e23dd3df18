// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// apiServer is the stand-in over TLS. It lets in who has a certificate of the clients' CA, or the
// token, and says who.
func apiServer(t *testing.T, s *standIn, clients *authority) (server *httptest.Server, ca string, who *string) {
	t.Helper()
	who = new(string)
	server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case len(r.TLS.PeerCertificates) > 0:
			*who = r.TLS.PeerCertificates[0].Subject.CommonName
		case r.Header.Get("Authorization") == "Bearer secret":
			*who = "token"
		default:
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.ServeHTTP(w, r)
	}))
	pool := x509.NewCertPool()
	pool.AddCert(clients.cert)
	server.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})), who
}

// clientPair is one PEM text with a client certificate and its key, as kubelet-client-current.pem
// is.
func clientPair(t *testing.T, a *authority, name string) string {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name, Organization: []string{"system:nodes"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, c, a.cert, a.key.Public(), a.key))(t)
	key := must(x509.MarshalPKCS8PrivateKey(a.key))(t)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})) +
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
}

func put(t *testing.T, dir, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func TestKubeconfig(t *testing.T) {
	clients := newAuthority(t, "clients")
	server, ca, who := apiServer(t, newStandIn(t), clients)
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	pair := clientPair(t, clients, "system:node:node-1")
	const good = "certificate-authority: ca.pem"
	for _, tt := range []struct {
		name, cluster, user string
		who, fail           string
		text                string // the whole file
	}{
		{name: "files beside it", cluster: good, user: "client-certificate: pair.pem, client-key: pair.pem",
			who: "system:node:node-1"},
		{name: "data", cluster: "certificate-authority-data: " + b64(ca), user: "client-certificate-data: " +
			b64(pair) + ", client-key-data: " + b64(pair), who: "system:node:node-1"},
		{name: "token", cluster: good, user: "token: secret", who: "token"},
		{name: "token file", cluster: good, user: "tokenFile: token", who: "token"},
		{name: "plugin with a token", cluster: good,
			user: `exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, args: [token], env: [{name: WORD, value: secret}]}`, who: "token"},
		{name: "plugin with a certificate", cluster: good,
			user: `exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, args: [pair]}`,
			who:  "system:node:node-1"},
		{name: "other server name", cluster: good + ", tls-server-name: example.com", user: "token: secret",
			who: "token"},

		{name: "wrong token", cluster: good, user: "token: guess", fail: "401"},
		{name: "other CA", cluster: "certificate-authority-data: " + b64(clients.pem), user: "token: secret",
			fail: "unknown authority"},
		{name: "not verified", cluster: "insecure-skip-tls-verify: true", user: "token: secret",
			fail: "skips the verification"},
		{name: "no CA in it", cluster: "certificate-authority: token", user: "token: secret",
			fail: "no PEM certificate"},
		{name: "no credentials", cluster: good, user: "", fail: "has kubelet joined the cluster?"},
		{name: "no key", cluster: good, user: "client-certificate: pair.pem", fail: "go together"},
		{name: "rotated away", cluster: good, user: "client-certificate: gone.pem, client-key: gone.pem",
			fail: "gone.pem: no such file"},
		{name: "no base64", cluster: good, user: "client-certificate-data: '%%%'",
			fail: "client-certificate-data: illegal base64"},
		{name: "plugin fails", cluster: good, user: `exec: {command: ./plugin, args: [fail]}`,
			fail: "plugin: exit status 3"},
		{name: "plugin says nothing", cluster: good, user: `exec: {command: ./plugin, args: [nothing]}`,
			fail: "neither a token nor a certificate"},
		{name: "plugin says nonsense", cluster: good, user: `exec: {command: ./plugin, args: [nonsense]}`,
			fail: "no ExecCredential"},
		{name: "no plugin", cluster: good, user: `exec: {command: no-such-program}`, fail: "not found"},
		{name: "http", text: "{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], clusters: " +
			"[{name: a, cluster: {server: 'http://x'}}], users: [{name: a, user: {token: a}}]}", fail: "want https://"},
		{name: "no context", text: "{current-context: b}", fail: `no context "b"`},
		{name: "no cluster", text: "{current-context: a, contexts: [{name: a, context: {cluster: c}}]}",
			fail: `no cluster "c"`},
		{name: "no user", text: "{current-context: a, contexts: [{name: a, context: {cluster: a, user: u}}], " +
			"clusters: [{name: a}]}", fail: `no user "u"`},
		{name: "no yaml", text: "{", fail: "yaml"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, "ca.pem", ca, 0o600)
			put(t, dir, "pair.pem", pair, 0o600)
			put(t, dir, "token", "secret\n", 0o600)
			put(t, dir, "plugin", fmt.Sprintf(`#!/bin/sh
echo "noise that may hold secrets" >&2
case $1 in
token) case $KUBERNETES_EXEC_INFO in *ExecCredential*) echo '{"status": {"token": "'$WORD'"}}';; esac;;
pair) echo '{"status": {"clientCertificateData": "%[1]s", "clientKeyData": "%[1]s"}}';;
fail) exit 3;;
nothing) echo '{}';;
*) echo hello;;
esac
`, strings.ReplaceAll(pair, "\n", `\\n`)), 0o700)
			text := tt.text
			if text == "" {
				text = fmt.Sprintf("{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], "+
					"clusters: [{name: a, cluster: {server: '%s', %s}}], users: [{name: a, user: {%s}}]}", server.URL,
					tt.cluster, tt.user)
			}
			put(t, dir, "kubelet.conf", text, 0o600)
			*who = ""
			c, err := connect(t.Context(), filepath.Join(dir, "kubelet.conf"), nil)
			if err == nil {
				_, err = c.node(t.Context(), nodeName)
				c.Close()
			}
			switch {
			case tt.fail == "" && (err != nil || *who != tt.who):
				t.Errorf("%q, %v", *who, err)
			case tt.fail != "" && (err == nil || !strings.Contains(err.Error(), tt.fail)):
				t.Errorf("error %v, want %q", err, tt.fail)
			}
		})
	}

	t.Run("kubelet's environment", func(t *testing.T) {
		dir := t.TempDir()
		put(t, dir, "ca.pem", ca, 0o600)
		put(t, dir, "kubelets-plugin", "#!/bin/sh\necho '{\"status\": {\"token\": \"'$WORD$OURS'\"}}'\n", 0o700)
		put(t, dir, "kubelet.conf",
			fmt.Sprintf("{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], clusters: "+
				"[{name: a, cluster: {server: '%s', %s}}], "+
				"users: [{name: a, user: {exec: {command: kubelets-plugin}}}]}",
				server.URL, good), 0o600)
		t.Setenv("OURS", "not for plugins")
		c := must(connect(t.Context(), filepath.Join(dir, "kubelet.conf"),
			[]string{"PATH=/nowhere:" + dir + ":" + os.Getenv("PATH"), "WORD=secret"}))(t)
		defer c.Close()
		if _, err := c.node(t.Context(), nodeName); err != nil || *who != "token" {
			t.Errorf("%q %v", *who, err)
		}
	})

	t.Run("rotated files are read anew", func(t *testing.T) {
		dir := t.TempDir()
		put(t, dir, "ca.pem", ca, 0o600)
		put(t, dir, "kubelet.conf",
			fmt.Sprintf("{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], clusters: "+
				"[{name: a, cluster: {server: '%s', certificate-authority: ca.pem}}], users: [{name: a, user: "+
				"{client-certificate: pair.pem, client-key: pair.pem}}]}", server.URL), 0o600)
		for _, name := range []string{"one", "two"} {
			put(t, dir, "pair.pem", clientPair(t, clients, name), 0o600)
			c := must(connect(t.Context(), filepath.Join(dir, "kubelet.conf"), nil))(t)
			if _, err := c.node(t.Context(), nodeName); err != nil || *who != name {
				t.Errorf("%q %v", *who, err)
			}
			c.Close()
		}
	})
}
