// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRotation lives through some CAs hour by hour. A node that reads the CAs as rarely, and renews
// as late, as a node may always trusts the controller, and the controller always trusts the node.
func TestRotation(t *testing.T) {
	for name, s := range map[string]Settings{
		"long":  {Life: 72 * time.Hour, CALife: 60 * 24 * time.Hour},
		"short": {Life: 12 * time.Hour, CALife: 5 * 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			issue := func(k *keys, now time.Time) *x509.Certificate {
				c, err := k.active.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "n"},
					ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, leafKey.Public(), now, s.Life)
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			valid := func(c *x509.Certificate, k *keys, now time.Time) error {
				_, err := c.Verify(x509.VerifyOptions{Roots: k.pool(), CurrentTime: now})
				return err
			}
			start := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
			k, asked, signers, most := &keys{}, "", map[string]bool{}, 0
			var node, own *x509.Certificate
			var seen *keys // by the node, at most 12 minutes ago
			const tick = 12 * time.Minute
			var step time.Duration
			for now := start; now.Before(start.Add(s.CALife * 9 / 4)); now = now.Add(step) {
				if now.Equal(start.Add(s.CALife / 2)) {
					asked = "by hand"
				}
				seen = nil
				if k.active != nil {
					before, err := parseKeys(must(t, k))
					if err != nil {
						t.Fatal(err)
					}
					seen = before
				}
				if _, err := k.step(now, s, asked); err != nil {
					t.Fatal(err)
				}
				step = time.Hour
				if k.next != nil {
					step = tick // the interesting time
				}
				signers[k.active.cert.Subject.CommonName], most = true, max(most, len(k.trusted()))
				if own == nil || own.Issuer.CommonName != k.active.cert.Subject.CommonName ||
					now.After(own.NotBefore.Add(s.Life/2)) {
					own = issue(k, now)
				}
				if seen != nil {
					if err := valid(own, seen, now); err != nil {
						t.Fatalf("%s: a node that read the CAs %s ago does not trust the controller: %v",
							now.Sub(start), step, err)
					}
				}
				if node == nil || now.After(node.NotBefore.Add(s.Life*4/5)) {
					node = issue(k, now)
				}
				if err := valid(node, k, now); err != nil {
					t.Fatalf("%s: the controller does not trust a node whose certificate is from %s: %v",
						now.Sub(start),
						node.NotBefore.Sub(start), err)
				}
			}
			if n := len(signers); n < 4 || n > 5 {
				t.Errorf("%d CAs have signed", n)
			}
			if most != 2 {
				t.Errorf("%d CAs were trusted at once", most)
			}
		})
	}
}

func must(t *testing.T, k *keys) map[string][]byte {
	t.Helper()
	d, err := k.data()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestKeysAreForgotten(t *testing.T) {
	s, now := Settings{Life: time.Hour, CALife: 100 * time.Hour}, time.Now()
	k := &keys{}
	for _, asked := range []string{"", "1"} {
		if _, err := k.step(now, s, asked); err != nil {
			t.Fatal(err)
		}
	}
	old := string(must(t, k)[dataKey])
	if did, err := k.step(now.Add(k.announce()), s, "1"); err != nil || !strings.Contains(did, "signs with the next") {
		t.Fatal(did, err)
	}
	for field, value := range must(t, k) {
		if strings.Contains(string(value), old) {
			t.Errorf("%s has the key of a CA that signs no more", field)
		}
	}
}

func TestAnnouncementOutlastsTheNodesInterval(t *testing.T) {
	for _, life := range []time.Duration{2 * time.Minute, time.Hour, 24 * time.Hour, 72 * time.Hour, 168 * time.Hour} {
		// ops/enrol: every sixteenth of the certificate's life, at least every 10 minutes, a fifth
		// more or less.
		interval := min(10*time.Minute, (life+life/10)/16) * 6 / 5
		if k := (&keys{longest: life}); k.announce() < 2*interval {
			t.Errorf("life %s: announced for %s, read every %s", life, k.announce(), interval)
		}
	}
}

func TestSettings(t *testing.T) {
	for want, s := range map[string]Settings{
		"":                  {Life: 72 * time.Hour, CALife: 8760 * time.Hour},
		"at least a minute": {Life: time.Second, CALife: time.Hour},
		"at least ten times that of the certificates": {Life: time.Hour, CALife: 2 * time.Hour},
	} {
		if err := s.Validate(); want == "" && err != nil || want != "" &&
			(err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
}

func TestNames(t *testing.T) {
	if SecretName != identity.BundleName {
		t.Error("the docs call both by one name")
	}
}
