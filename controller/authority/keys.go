// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Keys of the Secret.
const (
	dataCert      = "ca.crt" // signs
	dataKey       = "ca.key"
	dataNextCert  = "next.crt" // is published, and will sign
	dataNextKey   = "next.key"
	dataNextSince = "next-since"
	// dataPrevious signed before. It is trusted until everything that it has signed has expired;
	// its key is gone.
	dataPrevious      = "previous.crt"
	dataPreviousUntil = "previous-until"
	dataLongest       = "longest-life" // that it was told to give to a certificate
	dataRotated       = "rotated"      // value of RotateAnnotation that has been obeyed
)

const (
	// announceMost is the longest time for which a new CA is published before it signs: six times
	// as long as nodes take to read it.
	announceMost = time.Hour
	// backdateMost is how far clocks may differ. Certificates with a short life are backdated by a
	// tenth of that life.
	backdateMost = 5 * time.Minute
	// rotateAt is the part of a CA's life after which the next CA is made.
	rotateAt = 0.7
)

// Settings are the lifetimes of certificates.
type Settings struct {
	// Life is the lifetime of a node's certificate and of the controller's own.
	Life time.Duration
	// CALife is the lifetime of a CA.
	CALife time.Duration
}

// Validate returns an error if the settings contradict each other.
func (s Settings) Validate() error {
	switch {
	case s.Life < time.Minute:
		return fmt.Errorf("the life of certificates must be at least a minute, not %s", s.Life)
	case s.CALife < 10*s.Life:
		return fmt.Errorf("the CA's life must be at least ten times that of the certificates, which is %s, not %s",
			s.Life,
			s.CALife)
	}
	return nil
}

// pair is a CA.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// keys is the content of the Secret.
type keys struct {
	active        *pair
	next          *pair // nil: none
	nextSince     time.Time
	previous      []*x509.Certificate
	previousUntil time.Time
	longest       time.Duration
	rotated       string
}

// newPair makes a CA.
func newPair(now time.Time, life time.Duration) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		// The time tells the CAs apart: for people, and for TLS libraries that find an issuer by
		// its name.
		Subject:               pkix.Name{CommonName: "cri-proxy " + now.UTC().Format("2006-01-02T15:04:05.000Z")},
		NotBefore:             now.Add(-backdateMost),
		NotAfter:              now.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pair{cert, key}, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// step takes the keys to where they should be now. It returns in a few words what it did; "" if it
// did nothing. asked is the value of RotateAnnotation.
func (k *keys) step(now time.Time, s Settings, asked string) (did string, err error) {
	if k.active == nil || now.After(k.active.cert.NotAfter) {
		active, err := newPair(now, s.CALife)
		if err != nil {
			return "", err
		}
		*k = keys{active: active, longest: s.Life, rotated: asked}
		return "made a CA", nil
	}
	if s.Life > k.longest {
		k.longest, did = s.Life, "noted that certificates live longer"
	}
	life := k.active.cert.NotAfter.Sub(k.active.cert.NotBefore)
	old := now.After(k.active.cert.NotBefore.Add(time.Duration(float64(life) * rotateAt)))
	switch {
	case k.next == nil && (old || asked != k.rotated):
		if k.next, err = newPair(now, s.CALife); err != nil {
			return "", err
		}
		k.nextSince, k.rotated = now, asked
		return "made the next CA", nil
	case k.next != nil && !now.Before(k.nextSince.Add(k.announce())):
		k.previous = append(k.previous, k.active.cert)
		k.previousUntil = now.Add(k.longest + backdateMost)
		k.active, k.next, k.nextSince = k.next, nil, time.Time{}
		return "signs with the next CA", nil
	case len(k.previous) > 0 && now.After(k.previousUntil):
		k.previous, k.previousUntil, k.longest = nil, time.Time{}, s.Life
		return "withdrew the previous CA", nil
	}
	return did, nil
}

// announce is how long the next CA is published before it signs. How often nodes read the CA
// depends on the lifetimes of their certificates.
func (k *keys) announce() time.Duration { return min(announceMost, k.longest/4) }

// trusted returns all CAs that nodes and the controller trust.
func (k *keys) trusted() []*x509.Certificate {
	all := []*x509.Certificate{k.active.cert}
	if k.next != nil {
		all = append(all, k.next.cert)
	}
	return append(all, k.previous...)
}

func (k *keys) bundle() string {
	var text bytes.Buffer
	for _, c := range k.trusted() {
		text.Write(encode(c))
	}
	return text.String()
}

func (k *keys) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range k.trusted() {
		pool.AddCert(c)
	}
	return pool
}

// sign completes the template and signs it. The certificate is valid from a moment ago, because
// clocks differ, for life or until the CA expires.
func (p *pair) sign(
	template *x509.Certificate, public crypto.PublicKey, now time.Time, life time.Duration,
) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = now.Add(-min(backdateMost, life/10))
	template.NotAfter = now.Add(life)
	if template.NotAfter.After(p.cert.NotAfter) {
		template.NotAfter = p.cert.NotAfter
	}
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, p.cert, public, p.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// data encodes the keys as the content of the Secret.
func (k *keys) data() (map[string][]byte, error) {
	d := map[string][]byte{dataLongest: []byte(k.longest.String()), dataRotated: []byte(k.rotated)}
	put := func(p *pair, cert, key string) error {
		der, err := x509.MarshalPKCS8PrivateKey(p.key)
		if err != nil {
			return err
		}
		d[cert], d[key] = encode(p.cert), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		return nil
	}
	if err := put(k.active, dataCert, dataKey); err != nil {
		return nil, err
	}
	if k.next != nil {
		if err := put(k.next, dataNextCert, dataNextKey); err != nil {
			return nil, err
		}
		d[dataNextSince] = []byte(k.nextSince.UTC().Format(time.RFC3339Nano))
	}
	if len(k.previous) > 0 {
		for _, c := range k.previous {
			d[dataPrevious] = append(d[dataPrevious], encode(c)...)
		}
		d[dataPreviousUntil] = []byte(k.previousUntil.UTC().Format(time.RFC3339Nano))
	}
	return d, nil
}

// parseKeys is the inverse of data.
func parseKeys(d map[string][]byte) (*keys, error) {
	k := &keys{rotated: string(d[dataRotated])}
	var err error
	if k.active, err = parsePair(d, dataCert, dataKey); err != nil {
		return nil, err
	}
	if len(d[dataLongest]) > 0 {
		if k.longest, err = time.ParseDuration(string(d[dataLongest])); err != nil {
			return nil, fmt.Errorf("%s: %w", dataLongest, err)
		}
	}
	if len(d[dataNextCert]) > 0 {
		if k.next, err = parsePair(d, dataNextCert, dataNextKey); err != nil {
			return nil, err
		}
		if k.nextSince, err = time.Parse(time.RFC3339Nano, string(d[dataNextSince])); err != nil {
			return nil, fmt.Errorf("%s: %w", dataNextSince, err)
		}
	}
	if len(d[dataPrevious]) > 0 {
		if k.previous, err = parseCerts(d[dataPrevious]); err != nil {
			return nil, fmt.Errorf("%s: %w", dataPrevious, err)
		}
		if k.previousUntil, err = time.Parse(time.RFC3339Nano, string(d[dataPreviousUntil])); err != nil {
			return nil, fmt.Errorf("%s: %w", dataPreviousUntil, err)
		}
	}
	return k, nil
}

func parsePair(d map[string][]byte, cert, key string) (*pair, error) {
	both, err := tls.X509KeyPair(d[cert], d[key])
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", cert, key, err)
	}
	private, ok := both.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !both.Leaf.IsCA {
		return nil, fmt.Errorf("%s and %s are no CA with an ECDSA key", cert, key)
	}
	return &pair{both.Leaf, private}, nil
}

func parseCerts(text []byte) (all []*x509.Certificate, err error) {
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	return all, nil
}

func encode(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}
