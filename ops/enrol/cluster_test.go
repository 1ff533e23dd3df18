// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
)

const nodeName = "node-1"

// standIn answers as an API server with a controller behind it does, at a speed and with faults
// that a real one cannot be made to have. The real ones are in test/deploy.
type standIn struct {
	mu     sync.Mutex
	ca     *authority
	life   time.Duration
	away   bool           // no connection
	refuse map[string]int // HTTP code by the last part of a path
	// before it is signed; returns the public key to sign, nil: the one asked for
	change  func(*x509.Certificate) (any, error)
	uid     string // of the Node
	answer  bool   // requests are signed at once
	deny    string
	bundle  string // what is published in place of the CA's certificate
	made    []string
	bodies  []string
	pending map[string][]byte
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().
				Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(t)
	return &authority{must(x509.ParseCertificate(der))(t), key,
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newStandIn(t testing.TB) *standIn {
	return &standIn{ca: newAuthority(t, "ca"), life: 10 * time.Hour, answer: true, refuse: map[string]int{},
		pending: map[string][]byte{}}
}

func (s *standIn) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *standIn) requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.made)
}

// RoundTrip implements [http.RoundTripper] without a network, so that a clock can be fake.
func (s *standIn) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	away := s.away
	s.mu.Unlock()
	if away {
		return nil, errors.New("connection refused")
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Result(), nil
}

// ServeHTTP implements [http.Handler].
func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := path.Base(r.URL.Path)
	if code := s.refuse[last]; code != 0 {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": "refused by the test"})
		return
	}
	var answer any
	switch {
	case last == nodeName:
		answer = map[string]any{"metadata": map[string]any{"uid": s.uid},
			"status": map[string]any{"addresses": []map[string]string{
				{"type": "InternalIP", "address": "192.0.2.7"}, {"type": "InternalIP", "address": "2001:db8::7"},
				{"type": "Hostname", "address": "elsewhere"}, {"type": "ExternalIP", "address": "203.0.113.1"},
			}}}
	case last == identity.BundleName:
		text := s.ca.pem
		if s.bundle != "" {
			text = s.bundle
		}
		answer = map[string]any{"data": map[string]string{identity.BundleKey: text}}
	case r.Method == http.MethodPost:
		body, _ := io.ReadAll(r.Body)
		s.bodies = append(s.bodies, string(body))
		var q signingRequest
		if err := json.Unmarshal(body, &q); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		q.Metadata.Name = q.Metadata.GenerateName + string(rune('a'+len(s.made)))
		s.made = append(s.made, q.Metadata.Name)
		s.pending[q.Metadata.Name] = q.Spec.Request
		answer = q
	default:
		var q signingRequest
		request := s.pending[last]
		if request == nil {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		switch {
		case s.deny != "":
			q.Status.Conditions = append(q.Status.Conditions, struct {
				Type    string `json:"type"`
				Reason  string `json:"reason"`
				Message string `json:"message"`
			}{"Denied", "NotYours", s.deny})
		case s.answer:
			q.Status.Certificate = s.sign(request)
		}
		answer = q
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (s *standIn) sign(request []byte) []byte {
	block, _ := pem.Decode(request)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(int64(len(s.made)) * 333), Subject: csr.Subject, DNSNames: csr.DNSNames,
		IPAddresses: csr.IPAddresses,
		NotBefore:   time.Now().Add(-time.Second), NotAfter: time.Now().Add(s.life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if s.uid != "" {
		c.URIs = []*url.URL{identity.NodeURI(s.uid)}
	}
	key := csr.PublicKey
	if s.change != nil {
		other, err := s.change(c)
		if err != nil {
			panic(err)
		}
		if other != nil {
			key = other
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, s.ca.cert, key, s.ca.key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// enroller makes one that speaks to the stand-in without a network, and runs it until stop.
func (s *standIn) enroller(t testing.TB, dir string) (e *Enroller, log *logtest.Hook, stop func()) {
	t.Helper()
	logger, log := logtest.NewNullLogger()
	e = New(Options{Kubeconfig: "/none", Namespace: identity.DefaultNamespace, NodeName: nodeName,
		StateDir: dir, Log: logger})
	e.connect = func(context.Context) (*client, error) {
		return &client{apiserver.New("https://api", "", &http.Client{Transport: s})}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.Run(ctx)
	}()
	return e, log, func() {
		cancel()
		<-done
	}
}

func said(log *logtest.Hook, level logrus.Level, text string) bool {
	for _, entry := range log.AllEntries() {
		line, err := entry.String()
		if err == nil && entry.Level == level && strings.Contains(line, text) {
			return true
		}
	}
	return false
}
