// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
)

// files are a certificate, its key and the CA of the other side, read again when
// one of them has changed. Whether they have is looked at on each handshake.
type files struct {
	cert, key, ca string
	// complain is told of new files that cannot be used; the old ones stay in force.
	complain func(error)
	// changed is told of new authorities; nil: nobody is.
	changed func(*x509.CertPool)

	mu     sync.Mutex // guards all following fields
	stamps [3]stamp
	pair   *tls.Certificate
	roots  *x509.CertPool
}

// stamp changes when a file does, also when it is replaced by a symlink swap as
// the kubelet does for mounted Secrets.
type stamp struct {
	modTime time.Time
	size    int64
	info    fs.FileInfo
}

func (s stamp) same(o stamp) bool {
	return s.info != nil && o.info != nil &&
		s.modTime.Equal(o.modTime) && s.size == o.size && os.SameFile(s.info, o.info)
}

// load reads the files for the first time.
func (f *files) load() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	stamps, err := f.stat()
	if err != nil {
		return err
	}
	return f.readLocked(stamps)
}

// current returns the certificate and the CA in force, nil and why if there are none yet.
func (f *files) current() (*tls.Certificate, *x509.CertPool, error) {
	f.mu.Lock()
	before := f.roots
	err := f.refreshLocked()
	pair, roots := f.pair, f.roots
	f.mu.Unlock()
	if pair == nil {
		return nil, nil, err
	}
	if err != nil {
		f.complain(fmt.Errorf("new TLS files not used, those read before stay in force: %w", err))
	}
	if before != nil && before != roots && !before.Equal(roots) && f.changed != nil {
		f.changed(roots)
	}
	return pair, roots, nil
}

// refreshLocked reads the files if one of them is another one than before.
func (f *files) refreshLocked() error {
	stamps, err := f.stat()
	if err != nil {
		return err
	}
	same := true
	for i := range stamps {
		same = same && stamps[i].same(f.stamps[i])
	}
	if same {
		return nil
	}
	return f.readLocked(stamps)
}

func (f *files) stat() (stamps [3]stamp, err error) {
	for i, name := range []string{f.cert, f.key, f.ca} {
		fi, err := os.Stat(name)
		if err != nil {
			return stamps, fmt.Errorf("TLS file: %w", err)
		}
		stamps[i] = stamp{fi.ModTime(), fi.Size(), fi}
	}
	return stamps, nil
}

// readLocked takes the files over only if all three are good. A rotation seen halfway fails
// here, because certificate and key do not match, and is tried again on the next handshake.
func (f *files) readLocked(stamps [3]stamp) error {
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.cert, f.key, err)
	}
	pem, err := os.ReadFile(f.ca)
	if err != nil {
		return fmt.Errorf("CA file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("CA file %s: %w", f.ca, errors.New("holds no PEM certificate"))
	}
	f.stamps, f.pair, f.roots = stamps, &pair, roots
	return nil
}
