// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEnrol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, dir := newStandIn(t), t.TempDir()
		e, _, stop := s.enroller(t, dir)
		defer stop()
		if s := e.Status(); s.Certificate != nil || e.Awaited() == nil {
			t.Fatalf("%+v before anything", s)
		}
		time.Sleep(5 * time.Second)
		st := e.Status()
		if st.Certificate == nil || st.Problem != nil || st.Enrolments != 1 {
			t.Fatalf("%+v", st)
		}
		c := st.Certificate
		if c.Subject.CommonName != nodeName || len(c.DNSNames) != 1 || c.DNSNames[0] != nodeName ||
			len(c.IPAddresses) != 2 {
			t.Errorf("asked for %v %v %v", c.Subject, c.DNSNames, c.IPAddresses)
		}
		if _, err := tls.LoadX509KeyPair(CertFile(dir), CertFile(dir)); err != nil {
			t.Error(err)
		}
		for file, mode := range map[string]fs.FileMode{CertFile(dir): 0o600, CAFile(dir): 0o600,
			Directory(dir): 0o700 | fs.ModeDir} {
			if fi, err := os.Stat(file); err != nil || fi.Mode() != mode {
				t.Errorf("%s: %v %v", file, fi.Mode(), err)
			}
		}
		if left, _ := os.ReadDir(Directory(dir)); len(left) != 2 {
			t.Errorf("left %v", left)
		}
		if len(s.bodies) != 1 || strings.Contains(s.bodies[0], "PRIVATE") {
			t.Errorf("sent %q", s.bodies)
		}
	})
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, dir := newStandIn(t), t.TempDir()
		e, _, stop := s.enroller(t, dir)
		time.Sleep(5 * time.Second)
		first := e.Status().Certificate

		time.Sleep(time.Duration(float64(s.life)*0.69) - 10*time.Second)
		if s.requests() != 1 {
			t.Fatalf("renewed before 70 %%")
		}
		// Another process finds what is there, and asks for nothing.
		stop()
		e, log, stop := s.enroller(t, dir)
		defer stop()
		synctest.Wait()
		if e.Status().Certificate.SerialNumber.Cmp(first.SerialNumber) != 0 {
			t.Fatal("another certificate")
		}
		time.Sleep(time.Duration(float64(s.life) * 0.12))
		second := e.Status().Certificate
		if s.requests() != 2 || second.SerialNumber.Cmp(first.SerialNumber) == 0 {
			t.Fatalf("%d requests at 81 %%", s.requests())
		}

		// The API server is away for longer than the certificate is good.
		s.set(func() { s.away = true })
		time.Sleep(12 * time.Hour)
		st := e.Status()
		if st.Certificate.SerialNumber.Cmp(second.SerialNumber) != 0 || st.Problem == nil || st.Failures < 10 ||
			st.NextTry.IsZero() || time.Since(st.Since) < time.Hour {
			t.Fatalf("%+v", st)
		}
		if !said(log, logrus.WarnLevel, "connection refused") {
			t.Error("not logged")
		}
		if n := len(log.AllEntries()); n > 40 {
			t.Errorf("%d lines", n)
		}
		s.set(func() { s.away = false })
		time.Sleep(2 * retryMost)
		if st = e.Status(); st.Problem != nil || st.Failures != 0 ||
			st.Certificate.SerialNumber.Cmp(second.SerialNumber) == 0 {
			t.Fatalf("%+v", st)
		}
		if !said(log, logrus.InfoLevel, "in order again") {
			t.Error("the end of it is not logged")
		}
	})
}

func TestProblems(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(testing.TB, *standIn)
		after   time.Duration
		problem string // while it lasts
		most    int    // requests in that time
	}{
		{"no API server", func(_ testing.TB, s *standIn) { s.away = true }, time.Hour, "connection refused", 0},
		{"no CA published", func(_ testing.TB, s *standIn) { s.refuse[identity.BundleName] = http.StatusNotFound },
			time.Hour, "has not published its CA", 0},
		{"CA forbidden", func(_ testing.TB, s *standIn) { s.refuse[identity.BundleName] = http.StatusForbidden },
			time.Hour, "are the roles of this version", 0},
		{"CA is nonsense", func(_ testing.TB, s *standIn) { s.bundle = "nonsense" }, time.Hour,
			"holds no PEM certificate", 0},
		{"no Node yet", func(_ testing.TB, s *standIn) { s.refuse[nodeName] = http.StatusNotFound }, time.Hour,
			"there is no Node node-1: has kubelet registered it", 0},
		{"another node's name", func(_ testing.TB, s *standIn) { s.refuse[nodeName] = http.StatusForbidden }, time.Hour,
			"is nodeName, --node-name, that of the kubeconfig's user?", 0},
		{"requests forbidden",
			func(_ testing.TB, s *standIn) { s.refuse["certificatesigningrequests"] = http.StatusForbidden }, time.Hour,
			"creating a CertificateSigningRequest: the API server answers 403", 0},
		{"denied", func(_ testing.TB, s *standIn) { s.deny = "no" }, time.Hour, "Denied: NotYours: no", 12},
		{"no controller", func(_ testing.TB, s *standIn) { s.answer = false }, 3 * time.Hour,
			"waits for its answer: is cri-controller running?", 3},
		{"another key", func(t testing.TB, s *standIn) {
			s.change = func(*x509.Certificate) (any, error) {
				key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				return key.Public(), err
			}
		}, time.Hour, "it is for another key", 20},
		{"another node", func(_ testing.TB, s *standIn) {
			s.change = func(c *x509.Certificate) (any, error) { c.Subject.CommonName = "other"; return nil, nil }
		}, time.Hour, "it is for", 20},
		{"another CA", func(t testing.TB, s *standIn) { s.bundle = newAuthority(t, "other").pem }, time.Hour,
			"has not signed it", 20},
		{"no CA at all", func(t testing.TB, s *standIn) {
			s.bundle = string(s.sign(must(newRequestPEM())(t)))
		}, time.Hour, "is no CA", 0},
		{"from the future", func(_ testing.TB, s *standIn) {
			s.change = func(c *x509.Certificate) (any, error) {
				c.NotBefore = time.Now().Add(time.Minute)
				return nil,
					nil
			}
		}, time.Hour, "set the clock", 20},
		{"all but over", func(_ testing.TB, s *standIn) {
			s.change = func(c *x509.Certificate) (any, error) {
				c.NotBefore, c.NotAfter = time.Now().Add(-9*time.Hour), time.Now().Add(time.Hour)
				return nil, nil
			}
		}, time.Hour, "to be renewed at", 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, dir := newStandIn(t), t.TempDir()
				tt.change(t, s)
				e, log, stop := s.enroller(t, dir)
				defer stop()
				time.Sleep(tt.after)
				st := e.Status()
				if st.Certificate != nil || st.Problem == nil || !strings.Contains(st.Problem.Error(), tt.problem) {
					t.Fatalf("%+v", st)
				}
				if err := e.Awaited(); err == nil || !strings.Contains(err.Error(), tt.problem) {
					t.Errorf("awaited: %v", err)
				}
				if !said(log, logrus.WarnLevel, tt.problem) {
					t.Error("not logged")
				}
				if said(log, logrus.InfoLevel, "in order again") || st.Failures == 0 {
					t.Errorf("said to be in order while it was not: %+v", st)
				}
				if n := s.requests(); n > tt.most {
					t.Errorf("%d requests", n)
				}
				if _, err := os.Stat(CertFile(dir)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("there is a file: %v", err)
				}

				s.set(func() {
					s.away, s.answer, s.deny, s.bundle, s.change, s.refuse = false, true, "", "", nil, map[string]int{}
				})
				time.Sleep(2*retryMost + refreshMost)
				if st := e.Status(); st.Certificate == nil || st.Problem != nil {
					t.Errorf("%+v when it is over", st)
				}
			})
		})
	}
}

func newRequestPEM() ([]byte, error) {
	_, csr, err := newRequest(nodeName, node{})
	return csr, err
}

func TestAnotherCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, dir := newStandIn(t), t.TempDir()
		e, _, stop := s.enroller(t, dir)
		defer stop()
		time.Sleep(time.Minute)
		first, old := e.Status().Certificate, s.ca

		// Both are trusted: what there is stays.
		next := newAuthority(t, "next")
		s.set(func() { s.ca, s.bundle = next, next.pem+old.pem })
		time.Sleep(2 * refreshMost)
		if text, _ := os.ReadFile(CAFile(dir)); string(text) != next.pem+old.pem {
			t.Error("the CAs were not read")
		}
		if s.requests() != 1 {
			t.Errorf("%d requests", s.requests())
		}

		// The old one is withdrawn. Somebody whose CA is not known makes the node look at once.
		s.set(func() { s.bundle = "" })
		e.Refresh()
		time.Sleep(pokedMost + 5*time.Second)
		if c := e.Status().Certificate; s.requests() != 2 || c.SerialNumber.Cmp(first.SerialNumber) == 0 ||
			c.Issuer.CommonName != "next" {
			t.Errorf("%d requests, certificate of %s", s.requests(), c.Issuer)
		}
		// But not each time.
		s.set(func() { s.refuse[identity.BundleName] = http.StatusTeapot })
		synctest.Wait()
		read := e.Status().Bundle
		for range 1000 {
			e.Refresh()
		}
		if e.Status().Bundle != read {
			t.Error("it looked again at once")
		}
	})
}

func TestDamagedFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, dir := newStandIn(t), t.TempDir()
		if err := write(CertFile(dir), []byte("nonsense")); err != nil {
			t.Fatal(err)
		}
		e, _, stop := s.enroller(t, dir)
		defer stop()
		time.Sleep(5 * time.Second)
		if e.Status().Certificate == nil {
			t.Errorf("%+v", e.Status())
		}
	})
}

func TestNodeNamedByItsAddress(t *testing.T) {
	_, csr, err := newRequest("192.0.2.7", node{})
	if err != nil {
		t.Fatal(err)
	}
	s := newStandIn(t)
	c := must(leafOf(s.sign(csr)))(t)
	if len(c.DNSNames) != 0 || len(c.IPAddresses) != 1 || c.IPAddresses[0].String() != "192.0.2.7" {
		t.Errorf("%v %v", c.DNSNames, c.IPAddresses)
	}
}

// TestNodeIsMadeAnew: the Node is deleted and kubelet makes it again. The certificate of before is
// good for nobody, and the node asks for another.
func TestNodeIsMadeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, dir := newStandIn(t), t.TempDir()
		s.uid = "first"
		e, _, stop := s.enroller(t, dir)
		time.Sleep(5 * time.Second)
		if got := identity.NodeUID(e.Status().Certificate); got != "first" || s.requests() != 1 {
			t.Fatalf("bound to %q, %d requests", got, s.requests())
		}
		s.set(func() { s.uid = "second" })
		e.Refresh() // the controller has come, and gone
		time.Sleep(pokedMost + 5*time.Second)
		if got := identity.NodeUID(e.Status().Certificate); got != "second" || s.requests() != 2 {
			t.Errorf("bound to %q, %d requests", got, s.requests())
		}
		s.set(func() { s.uid = "third" })
		time.Sleep(2 * refreshMost) // nobody comes
		if got := identity.NodeUID(e.Status().Certificate); got != "third" || s.requests() != 3 {
			t.Errorf("bound to %q, %d requests", got, s.requests())
		}
		stop()
		s.set(func() { s.uid = "fourth" })
		e, _, stop = s.enroller(t, dir) // the next process finds the old one on the disk
		defer stop()
		time.Sleep(5 * time.Second)
		if got := identity.NodeUID(e.Status().Certificate); got != "fourth" || s.requests() != 4 {
			t.Errorf("bound to %q, %d requests", got, s.requests())
		}
	})
}
