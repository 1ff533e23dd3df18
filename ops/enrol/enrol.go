// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package enrol

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

const (
	// refreshMost is how often the controller's CA is read at least. The controller signs with a
	// new one only after a multiple of it.
	refreshMost = 10 * time.Minute
	// refreshLeast is for certificates that live for minutes.
	refreshLeast = 5 * time.Second
	// pokedMost is how long the CA is not read again when strangers come, who may be anybody.
	pokedMost = 30 * time.Second
	// A failure is tried again after retryFirst, then after twice as long each time, up to
	// retryMost. A denial is not taken back soon.
	retryFirst = 5 * time.Second
	retryMost  = 10 * time.Minute
	retryDeny  = time.Minute
	// The answer to a request is looked for after askFirst, then less and less often: a request
	// that waits for its controller must cost the API server of a large cluster next to nothing.
	askFirst = 500 * time.Millisecond
	askMost  = time.Minute
	// askFor is how long; the cluster removes requests that nobody has answered after a day.
	askFor = time.Hour
	// unanswered is when a request that waits is worth telling about.
	unanswered = 15 * time.Second
)

// Options of [New]. All fields but Environ are required.
type Options struct {
	// Kubeconfig is kubelet's. It is read anew each time, and so are the files that it names.
	Kubeconfig string
	// Environ returns kubelet's environment, which has its proxies and is that of its exec plugin;
	// nil, or what it returns, for this process's own.
	Environ func() []string
	// Namespace is the controller's.
	Namespace string
	// NodeName is the node's name in the cluster.
	NodeName string
	// StateDir is the proxy's; see [Directory].
	StateDir string
	// Log gets each certificate, and each failure.
	Log logrus.FieldLogger
}

// Status is how the node's identity stands.
type Status struct {
	// Certificate serves now; nil: none yet.
	Certificate *x509.Certificate
	// Renewal is when it will be renewed.
	Renewal time.Time
	// Problem is why there is no certificate, or no new one, or no news of the controller's CA;
	// nil: none. Since when, and when it is tried again.
	Problem    error
	Since      time.Time
	NextTry    time.Time
	Failures   int       // in a row
	Bundle     time.Time // when the CA was read last
	Enrolments uint64    // certificates got by this process
}

// Enroller keeps the node's certificate and the controller's CA on disk, and new. [Enroller.Run]
// does the work.
type Enroller struct {
	o       Options
	connect func(context.Context) (*client, error)
	poke    chan struct{} // one: somebody came whom the CA on disk does not know
	changed chan struct{} // one: the CA on disk has changed

	mu     sync.Mutex
	status Status                // guarded by mu
	uid    string                // of the Node, as it was read last; guarded by mu
	faults map[string]error      // by loop, guarded by mu
	tries  map[string]*time.Time // of the next try, by loop, guarded by mu
}

// New returns an enroller with what is on disk. It has not spoken to anybody.
func New(o Options) *Enroller {
	e := &Enroller{
		o: o, poke: make(chan struct{}, 1), changed: make(chan struct{}, 1), faults: map[string]error{},
		tries: map[string]*time.Time{},
	}
	e.connect = func(ctx context.Context) (*client, error) {
		var environ []string
		if o.Environ != nil {
			environ = o.Environ()
		}
		return connect(ctx, o.Kubeconfig, environ)
	}
	e.status.Certificate, _ = load(o.StateDir) // Run says what is wrong with it
	if c := e.status.Certificate; c != nil {
		e.status.Renewal = renewalOf(c)
	}
	return e
}

// Status returns how things stand.
func (e *Enroller) Status() Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status
}

// Awaited says why there is no certificate yet.
func (e *Enroller) Awaited() error {
	s := e.Status()
	if s.Problem != nil {
		return fmt.Errorf("this node has no certificate yet: %w", s.Problem)
	}
	return errors.New("this node has no certificate yet; it is asking the controller for one")
}

// Refresh makes the controller's CA be read soon: somebody came whose CA is not known, or who does
// not know this node's. It does not wait.
func (e *Enroller) Refresh() {
	select {
	case e.poke <- struct{}{}:
	default:
	}
}

// Run enrols and renews until ctx ends. Nothing that it meets ends it sooner.
func (e *Enroller) Run(ctx context.Context) {
	var loops sync.WaitGroup
	loops.Go(func() { guard.Keep(ctx, e.o.Log, func() { e.keepBundle(ctx) }) })
	loops.Go(func() { guard.Keep(ctx, e.o.Log, func() { e.keepCertificate(ctx) }) })
	loops.Wait()
}

// keepBundle reads the controller's CA now, at intervals, and when poked.
func (e *Enroller) keepBundle(ctx context.Context) {
	const loop = "ca"
	retry := retryFirst
	for {
		pause := jitter(e.refreshEvery())
		if err := e.readCA(ctx); err != nil {
			pause = min(jitter(retry), pause)
			retry = min(2*retry, retryMost)
			e.fault(ctx, loop, err, pause)
		} else {
			retry = retryFirst
			e.fault(ctx, loop, nil, 0)
		}
		// A stranger at the door makes it look again, but not all the time.
		quiet := max(refreshLeast, min(pokedMost, e.refreshEvery()/20))
		if !e.wait(ctx, min(pause, quiet), nil) || pause > quiet && !e.wait(ctx, pause-quiet, e.poke) {
			return
		}
	}
}

// refreshEvery is how often the CA is read: several times in the life of a certificate.
func (e *Enroller) refreshEvery() time.Duration {
	c := e.Status().Certificate
	if c == nil {
		return refreshMost
	}
	return max(refreshLeast, min(refreshMost, c.NotAfter.Sub(c.NotBefore)/16))
}

// readCA puts what the controller publishes on disk.
func (e *Enroller) readCA(ctx context.Context) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	e.readNode(ctx, c)
	text, err := c.bundle(ctx, e.o.Namespace)
	switch {
	case apiserver.IsCode(err, http.StatusNotFound):
		return fmt.Errorf("the controller has not published its CA, ConfigMap %s/%s: is cri-controller installed, in "+
			"that namespace (ops.enrol.namespace) and with identity.mode csr?", e.o.Namespace, identity.BundleName)
	case apiserver.IsCode(err, http.StatusForbidden):
		return fmt.Errorf("reading the controller's CA: %w (are the roles of this version of cri-controller "+
			"installed, and is the kubeconfig kubelet's?)", err)
	case err != nil:
		return fmt.Errorf("reading the controller's CA: %w", err)
	}
	if _, err := readBundle([]byte(text)); err != nil {
		return fmt.Errorf("the CA that the controller publishes, ConfigMap %s/%s, cannot be used, the one before "+
			"stays in force: %w", e.o.Namespace, identity.BundleName, err)
	}
	old, _ := os.ReadFile(CAFile(e.o.StateDir))
	if !bytes.Equal(old, []byte(text)) {
		if err := write(CAFile(e.o.StateDir), []byte(text)); err != nil {
			return err
		}
		e.o.Log.WithField("configmap", e.o.Namespace+"/"+identity.BundleName).Info("the controller's CA is read")
		select {
		case e.changed <- struct{}{}:
		default:
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.status.Bundle = time.Now()
	return nil
}

// readNode notices that the Node is another one than the certificate is bound to: it was deleted,
// and kubelet has made it again. The controller takes no certificate of an earlier one. A Node that
// cannot be read is met again when the certificate is renewed.
func (e *Enroller) readNode(ctx context.Context, c *client) {
	n, err := c.node(ctx, e.o.NodeName)
	if err != nil || n.Metadata.UID == "" {
		return
	}
	e.mu.Lock()
	other := e.uid != n.Metadata.UID
	e.uid = n.Metadata.UID
	e.mu.Unlock()
	if other {
		select {
		case e.changed <- struct{}{}:
		default:
		}
	}
}

// keepCertificate enrols when there is need, and waits until there is again.
func (e *Enroller) keepCertificate(ctx context.Context) {
	const loop = "certificate"
	retry := retryFirst
	for {
		at, why := e.due()
		if pause := time.Until(at); pause > 0 {
			if !e.wait(ctx, pause, e.changed) {
				return
			}
			continue
		}
		if _, err := os.Stat(CAFile(e.o.StateDir)); errors.Is(err, fs.ErrNotExist) {
			// The other loop says what keeps it.
			if !e.wait(ctx, refreshMost, e.changed) {
				return
			}
			continue
		}
		err := e.enrol(ctx, why)
		if err == nil {
			retry = retryFirst
			e.fault(ctx, loop, nil, 0)
			continue
		}
		var denied *deniedError
		if errors.As(err, &denied) {
			retry = max(retry, retryDeny)
		}
		pause := jitter(retry)
		retry = min(2*retry, retryMost)
		e.fault(ctx, loop, err, pause)
		if !e.wait(ctx, pause, nil) {
			return
		}
	}
}

// due is when there is need of a certificate, and why.
func (e *Enroller) due() (time.Time, string) {
	c, err := load(e.o.StateDir)
	switch {
	case err != nil:
		return time.Time{}, "the one on disk cannot be used: " + err.Error()
	case c == nil:
		return time.Time{}, "there is none"
	case c.Subject.CommonName != e.o.NodeName:
		return time.Time{}, fmt.Sprintf("the one on disk is that of %q", c.Subject.CommonName)
	}
	e.mu.Lock()
	uid := e.uid
	e.mu.Unlock()
	if bound := identity.NodeUID(c); bound != "" && uid != "" && bound != uid {
		return time.Time{}, "the one on disk is that of an earlier Node " + e.o.NodeName
	}
	if text, err := os.ReadFile(CAFile(e.o.StateDir)); err == nil {
		if roots, err := readBundle(text); err == nil && signedBy(c, roots) != nil {
			return time.Time{}, "the controller has another CA"
		}
	}
	at := renewalOf(c)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.status.Certificate, e.status.Renewal = c, at
	return at, "it is time"
}

// deniedError is a request that was refused for good.
type deniedError struct{ text string }

func (e *deniedError) Error() string { return e.text }

// enrol gets a certificate and puts it on disk.
func (e *Enroller) enrol(ctx context.Context, why string) error {
	log := e.o.Log.WithField("node", e.o.NodeName)
	level := logrus.InfoLevel
	if e.Status().Failures > 0 {
		level = logrus.DebugLevel // its failures are logged
	}
	log.WithField("because", why).Log(level, "asking the controller for a certificate")
	name, key, err := e.ask(ctx)
	if err != nil {
		return err
	}
	cert, err := e.awaitAnswer(ctx, name)
	if err != nil {
		return err
	}
	leaf, err := e.check(ctx, cert, key)
	if err != nil {
		return fmt.Errorf("certificate of CertificateSigningRequest %s: %w", name, err)
	}
	if err := save(e.o.StateDir, cert, key); err != nil {
		return err
	}
	e.mu.Lock()
	e.status.Certificate, e.status.Renewal = leaf, renewalOf(leaf)
	e.status.Enrolments++
	e.mu.Unlock()
	e.Refresh() // how often it looks depends on the certificate
	log.WithFields(logrus.Fields{"request": name, "until": leaf.NotAfter.Format(time.RFC3339),
		"renewal": renewalOf(leaf).Format(time.RFC3339)}).Info("enrolled")
	return nil
}

// ask makes a key and a request for it. The key is in memory only until there is a certificate for
// it.
func (e *Enroller) ask(ctx context.Context) (name string, key *ecdsa.PrivateKey, err error) {
	c, err := e.connect(ctx)
	if err != nil {
		return "", nil, err
	}
	defer c.Close()
	n, err := c.node(ctx, e.o.NodeName)
	switch {
	case apiserver.IsCode(err, http.StatusNotFound):
		return "", nil, fmt.Errorf("there is no Node %s: has kubelet registered it, and is nodeName (--node-name) "+
			"its name?", e.o.NodeName)
	case apiserver.IsCode(err, http.StatusForbidden):
		return "", nil, fmt.Errorf("reading Node %s: %w (is nodeName, --node-name, that of the kubeconfig's user?)",
			e.o.NodeName, err)
	case err != nil:
		return "", nil, fmt.Errorf("reading Node %s: %w", e.o.NodeName, err)
	}
	key, csr, err := newRequest(e.o.NodeName, n)
	if err != nil {
		return "", nil, err
	}
	if name, err = c.request(ctx, e.o.NodeName, csr); err != nil {
		return "", nil, fmt.Errorf("creating a CertificateSigningRequest: %w", err)
	}
	return name, key, nil
}

// awaitAnswer returns the certificate of a request.
func (e *Enroller) awaitAnswer(ctx context.Context, name string) ([]byte, error) {
	const loop = "request"
	began, pause := time.Now(), askFirst
	for {
		if !e.wait(ctx, jitter(pause), nil) {
			return nil, ctx.Err()
		}
		pause = min(2*pause, askMost)
		cert, err := e.look(ctx, name)
		var denied *deniedError
		waited := time.Since(began)
		switch {
		case err == nil && len(cert) > 0:
			return cert, nil
		case errors.As(err, &denied), apiserver.IsCode(err, http.StatusNotFound):
			return nil, err
		case waited > askFor:
			return nil, fmt.Errorf("CertificateSigningRequest %s has not been answered within %s: is cri-controller "+
				"running?", name, askFor)
		case err != nil:
			e.fault(ctx, loop, fmt.Errorf("asking for the answer to CertificateSigningRequest %s: %w", name, err),
				pause)
		case waited > unanswered:
			e.fault(ctx, loop,
				fmt.Errorf("CertificateSigningRequest %s waits for its answer: is cri-controller running?", name),
				pause)
		}
	}
}

// look returns the certificate of a request, nil if there is no answer yet.
func (e *Enroller) look(ctx context.Context, name string) ([]byte, error) {
	c, err := e.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r, err := c.answer(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, condition := range r.Status.Conditions {
		if condition.Type == "Denied" || condition.Type == "Failed" {
			return nil, &deniedError{fmt.Sprintf("CertificateSigningRequest %s: %s: %s: %s", name, condition.Type,
				condition.Reason, condition.Message)}
		}
	}
	return r.Status.Certificate, nil
}

// check returns the certificate if it is what was asked for, by somebody whom the node trusts.
func (e *Enroller) check(ctx context.Context, cert []byte, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	c, err := leafOf(cert)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(c.PublicKey) {
		return nil, errors.New("it is for another key")
	}
	if c.Subject.CommonName != e.o.NodeName {
		return nil, fmt.Errorf("it is for %q", c.Subject.CommonName)
	}
	e.mu.Lock()
	if uid := identity.NodeUID(c); uid != "" {
		e.uid = uid // the controller has just read the Node
	}
	e.mu.Unlock()
	if now := time.Now(); now.Before(c.NotBefore) || now.After(c.NotAfter) {
		return nil, fmt.Errorf("it is good from %s to %s, and here it is %s: set the clock of the node, or of the "+
			"controller's", c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	if at := renewalOf(c); !at.After(time.Now()) {
		// It would be renewed at once, and again and again.
		return nil, fmt.Errorf("it is good until %s and to be renewed at %s, and here it is %s: set the clock of the "+
			"node, or of the controller's", c.NotAfter.Format(time.RFC3339), at.Format(time.RFC3339),
			time.Now().Format(time.RFC3339))
	}
	verify := func() error {
		text, err := os.ReadFile(CAFile(e.o.StateDir))
		if err != nil {
			return err
		}
		roots, err := readBundle(text)
		if err != nil {
			return err
		}
		return signedBy(c, roots)
	}
	if verify() == nil {
		return c, nil
	}
	// It may have been signed with a CA that is newer than what was read.
	if err := e.readCA(ctx); err != nil {
		return nil, err
	}
	if err := verify(); err != nil {
		return nil, fmt.Errorf("the CA that the controller publishes has not signed it: %w", err)
	}
	return c, nil
}

// fault notes what keeps one of the loops, and logs it when it is new.
func (e *Enroller) fault(ctx context.Context, loop string, err error, pause time.Duration) {
	if err != nil && ctx.Err() != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	before := e.faults[loop]
	if err == nil {
		delete(e.faults, loop)
		delete(e.tries, loop)
	} else {
		next := time.Now().Add(pause)
		e.faults[loop], e.tries[loop] = err, &next
		if loop != "request" || before == nil { // a request that waits is one failure
			e.status.Failures++
		}
	}
	if loop == "certificate" { // which is how the request ends
		delete(e.faults, "request")
		delete(e.tries, "request")
	}
	if err != nil && (before == nil || before.Error() != err.Error()) {
		e.o.Log.WithError(err).WithField("again", pause.Round(time.Second).String()).Warn("identity of this node")
	}
	was := e.status.Problem
	e.status.Problem, e.status.NextTry = nil, time.Time{}
	// What keeps the certificate says more than what keeps the CA.
	for _, l := range []string{"request", "certificate", "ca"} {
		if f := e.faults[l]; f != nil {
			e.status.Problem, e.status.NextTry = f, *e.tries[l]
			break
		}
	}
	switch {
	case e.status.Problem == nil:
		e.status.Since, e.status.Failures = time.Time{}, 0
		if was != nil {
			e.o.Log.Info("the identity of this node is in order again")
		}
	case was == nil:
		e.status.Since = time.Now()
	}
}

// wait returns true after d, or when something comes from early, and false when ctx has ended.
func (e *Enroller) wait(ctx context.Context, d time.Duration, early <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-early:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// jitter returns d, a fifth more or less.
func jitter(d time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(d)*2/5+1))
	if err != nil {
		return d
	}
	return d - d/5 + time.Duration(n.Int64())
}
