// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// registry starts another registry and makes it known to the node as host.
func registry(t *testing.T, host string, o testbed.RegistryOptions, more ...string) (addr string) {
	t.Helper()
	addr, err := bed.StartRegistryAs(t.Context(), "registry-"+host, o)
	must(t, err)
	t.Cleanup(func() { _ = bed.Process("registry-" + host).Signal(unix.SIGKILL) })
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), host)) })
	scheme := "http://"
	if o.TLS.Cert != "" {
		scheme = "https://"
	}
	must(t, bed.MapRegistry(host, scheme+addr, more...))
	return addr
}

// TestTLS has a registry whose certificate is signed by a CA of the house.
func TestTLS(t *testing.T) {
	p := push(t, "secure/app:1", 2, 1)
	cert, err := bed.ServingCert("registry-tls")
	must(t, err)
	addr := registry(t, "tls.test", testbed.RegistryOptions{TLS: cert}, fmt.Sprintf("ca = %q", bed.PKI.ClusterCA.Cert))
	for host, line := range map[string]string{"verifies-not.test": "skip_verify = true", "trusts-not.test": "",
		"trusts-another.test": fmt.Sprintf("ca = %q", bed.PKI.OtherCA.Cert)} {
		must(t, bed.MapRegistry(host, "https://"+addr, line))
		t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(bed.RegistryHostsDir(), host)) })
	}
	must(t, bed.MapRegistry("speaks-tls.test", "http://"+addr))
	must(t, bed.MapRegistry("speaks-none.test", "https://"+bed.Registry))
	for name, tt := range map[string]struct {
		host   string
		limit  int64
		reason string
		says   string
	}{
		"known CA":          {host: "tls.test"},
		"known CA, limited": {host: "tls.test", limit: 100 * mib},
		"not verified":      {host: "verifies-not.test"},
		"unknown CA":        {host: "trusts-not.test", reason: "RegistryUnavailable", says: "does not trust"},
		"unknown CA, limited": {host: "trusts-not.test", limit: 100 * mib, reason: "RegistryUnavailable",
			says: "does not trust"},
		"another CA":           {host: "trusts-another.test", reason: "RegistryUnavailable", says: "ca in hosts.toml"},
		"plain HTTP for HTTPS": {host: "speaks-tls.test", reason: "RegistryUnavailable", says: "https://"},
		"HTTPS for plain HTTP": {host: "speaks-none.test", reason: "RegistryUnavailable", says: "plain HTTP"},
	} {
		t.Run(name, func(t *testing.T) {
			uid := begin(t, &opsv1.PullRequest{Image: tt.host + "/" + p.name, BytesPerSecond: tt.limit, MaxAttempts: 1})
			if tt.reason == "" {
				if op := succeeds(t, uid); op.GetReason() != "Pulled" {
					t.Errorf("%v", op)
				}
				return
			}
			if op := fails(t, uid, tt.reason); !strings.Contains(op.GetMessage(), tt.says) {
				t.Errorf("%q is not in %q", tt.says, op.GetMessage())
			}
		})
	}
}

// tokens is a token server as registries in clouds have one (distribution,
// docs/spec/auth/token.md).
type tokens struct {
	*httptest.Server
	signer tls.Certificate
	// post says that it takes OAuth 2 posts beside the older requests.
	post   atomic.Bool
	issued atomic.Int64
}

// refresh is an identity token of the user's.
const refresh = "refresh-" + testbed.RegistryPassword

func newTokens(t *testing.T) *tokens {
	t.Helper()
	pair, err := bed.ServingCert("token-signer")
	must(t, err)
	s := &tokens{}
	s.signer, err = tls.LoadX509KeyPair(pair.Cert, pair.Key)
	must(t, err)
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

// ServeHTTP implements [http.Handler].
func (s *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && !s.post.Load() {
		http.Error(w, "no", http.StatusMethodNotAllowed)
		return
	}
	user, secret, known := r.BasicAuth()
	switch r.FormValue("grant_type") {
	case "password":
		user, secret, known = r.FormValue("username"), r.FormValue("password"), true
	case "refresh_token":
		known = true
		if r.FormValue("refresh_token") == refresh {
			user, secret = testbed.RegistryUser, testbed.RegistryPassword
		}
	}
	if known && (user != testbed.RegistryUser || secret != testbed.RegistryPassword) {
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	access := []map[string]any{}
	for _, scope := range strings.Fields(strings.Join(r.Form["scope"], " ")) {
		// repository:team/app:pull
		if f := strings.Split(scope, ":"); len(f) == 3 && (known || strings.HasPrefix(f[1], "public/")) {
			access = append(access, map[string]any{"type": f[0], "name": f[1], "actions": []string{"pull"}})
		}
	}
	s.issued.Add(1)
	token := s.sign(map[string]any{
		"iss": "bed", "aud": "registry", "sub": user, "jti": rand.Text(), "access": access,
		"iat": time.Now().Unix(), "nbf": time.Now().Add(-time.Minute).Unix(), "exp": time.Now().Add(time.Minute).Unix(),
	})
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 60})
}

func (s *tokens) sign(claims map[string]any) string {
	part := func(v any) string {
		b, _ := json.Marshal(v) // plain data
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]any{"typ": "JWT", "alg": "ES256",
		"x5c": []string{base64.StdEncoding.EncodeToString(s.signer.Certificate[0])}}) + "." + part(claims)
	sum := sha256.Sum256([]byte(text))
	x, y, err := ecdsa.Sign(rand.Reader, s.signer.PrivateKey.(*ecdsa.PrivateKey), sum[:])
	if err != nil {
		return "unsigned"
	}
	return text + "." +
		base64.RawURLEncoding.EncodeToString(append(x.FillBytes(make([]byte, 32)), y.FillBytes(make([]byte, 32))...))
}

// TestTokens has a registry that sends its clients to a token server.
func TestTokens(t *testing.T) {
	private, public := push(t, "team/tokens:1", 2, 1), push(t, "public/tokens:1", 2, 1)
	server := newTokens(t)
	cert, err := bed.ServingCert("registry-tokens")
	must(t, err)
	registry(t, "tokens.test", testbed.RegistryOptions{TLS: cert, Auth: map[string]any{"token": map[string]any{
		"realm": server.URL + "/token", "service": "registry", "issuer": "bed",
		"rootcertbundle": bed.PKI.ClusterCA.Cert,
	}}}, fmt.Sprintf("ca = %q", bed.PKI.ClusterCA.Cert))
	good := &opsv1.RegistryCredential{Match: "tokens.test", Username: testbed.RegistryUser,
		Password: testbed.RegistryPassword}
	for name, tt := range map[string]struct {
		image      string
		credential *opsv1.RegistryCredential
		post       bool
		limit      int64
		reason     string
	}{
		"right":          {image: private.name, credential: good},
		"right, limited": {image: private.name, credential: good, limit: 100 * mib},
		"right, OAuth 2": {image: private.name, credential: good, post: true},
		"identity token": {image: private.name,
			credential: &opsv1.RegistryCredential{Match: "tokens.test", Username: "<token>", IdentityToken: refresh},
			post:       true},
		"identity, limited": {image: private.name,
			credential: &opsv1.RegistryCredential{Match: "tokens.test", IdentityToken: refresh}, post: true,
			limit: 100 * mib},
		"wrong": {image: private.name,
			credential: &opsv1.RegistryCredential{Match: "tokens.test", Username: testbed.RegistryUser, Password: "x"},
			reason:     "Unauthorized"},
		"wrong, OAuth 2": {image: private.name,
			credential: &opsv1.RegistryCredential{Match: "tokens.test", Username: testbed.RegistryUser, Password: "x"},
			post:       true, reason: "Unauthorized"},
		"none":                   {image: private.name, reason: "Unauthorized"},
		"none, for a public one": {image: public.name},
	} {
		t.Run(name, func(t *testing.T) {
			server.post.Store(tt.post)
			issued := server.issued.Load()
			req := &opsv1.PullRequest{Image: "tokens.test/" + tt.image, BytesPerSecond: tt.limit, MaxAttempts: 1}
			if tt.credential != nil {
				req.Credentials = []*opsv1.RegistryCredential{tt.credential}
			}
			uid := begin(t, req)
			if tt.reason != "" {
				if op := fails(t, uid, tt.reason); !strings.Contains(op.GetMessage(), "pull secret") {
					t.Errorf("%v", op)
				}
				return
			}
			if op := succeeds(t, uid); op.GetReason() != "Pulled" || server.issued.Load() == issued {
				t.Errorf("%d tokens: %v", server.issued.Load()-issued, op)
			}
		})
	}
	t.Run("token server away", func(t *testing.T) {
		server.Close()
		fails(t, begin(t,
			&opsv1.PullRequest{Image: "tokens.test/" + private.name, Credentials: []*opsv1.RegistryCredential{good},
				MaxAttempts: 1}), "RegistryUnavailable")
	})
	must(t, secretsLeft())
}
