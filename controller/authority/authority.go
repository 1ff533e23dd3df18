// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"

	"github.com/cri-proxy/cri-proxy/api/identity"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
)

const (
	// SecretName is the Secret with the CA's keys, in the controller's namespace.
	SecretName = "cri-proxy-ca"
	// RotateAnnotation on the Secret asks for a new CA when its value changes.
	RotateAnnotation = "cri-proxy.io/rotate"

	// maintainEvery is how often the controller reads the Secret. So it notices within that time
	// that somebody has deleted the Secret or has asked for a rotation.
	maintainEvery = 5 * time.Second
	// maintainRetry is the interval after a failure, or after somebody else has written first.
	maintainRetry = 2 * time.Second
	// noticedIn is how often a node checks which Node object is its own (ops/enrol).
	noticedIn = 10 * time.Minute
)

// Authority keeps the CA, and is the controller's identity towards nodes. Set all fields before
// Start; Replaced is optional.
type Authority struct {
	// Client writes, and reads Nodes from the cache. Reader reads past the cache.
	Client client.Client
	Reader client.Reader
	// Namespace is the namespace of the Secret and the ConfigMap.
	Namespace string
	Settings  Settings
	Metrics   *Metrics
	Log       logrus.FieldLogger
	// Replaced is called when a new CA has replaced the old one without an overlap: certificates of
	// the old CA are no longer valid.
	Replaced func()

	once  sync.Once
	ready chan struct{} // closed when there is an identity

	mu       sync.Mutex
	keys     *keys            // guarded by mu; not changed once it is here
	identity *tls.Certificate // guarded by mu
	roots    *x509.CertPool   // guarded by mu
}

var (
	_ manager.LeaderElectionRunnable = (*Authority)(nil)
	_ mtls.Identity                  = (*Authority)(nil)
)

// NeedLeaderElection implements [manager.LeaderElectionRunnable]: a replica that does not lead
// dials no node.
func (*Authority) NeedLeaderElection() bool { return true }

// Start keeps the CA until ctx ends. It implements [manager.Runnable].
func (a *Authority) Start(ctx context.Context) error {
	failing := ""
	for {
		pause := maintainEvery
		if err := a.maintain(ctx, time.Now()); err != nil && ctx.Err() == nil {
			pause = maintainRetry
			if failing != err.Error() && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
				a.Log.WithError(err).Error("the CA of the commands to nodes")
				failing = err.Error()
			}
		} else {
			failing = ""
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// maintain reads the Secret, which is the source of truth, and advances its keys if it is time.
// Then it publishes what nodes are to trust, and renews the controller's own certificate. It writes
// only what it has just read: if two replicas do this at the same time, one of them begins again.
func (a *Authority) maintain(ctx context.Context, now time.Time) error {
	var secret corev1.Secret
	k, asked := &keys{}, ""
	err := a.Reader.Get(ctx, client.ObjectKey{Namespace: a.Namespace, Name: SecretName}, &secret)
	exists := err == nil
	switch {
	case apierrors.IsNotFound(err):
		secret = corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: a.Namespace, Name: SecretName,
			Labels: map[string]string{"app.kubernetes.io/part-of": "cri-proxy"}}}
	case err != nil:
		return fmt.Errorf("reading Secret %s/%s: %w", a.Namespace, SecretName, err)
	default:
		asked = secret.Annotations[RotateAnnotation]
		if k, err = parseKeys(secret.Data); err != nil {
			return fmt.Errorf("the Secret %s/%s holds no CA, and is left as it is (with its deletion a new one "+
				"begins, and "+
				"all nodes enrol anew): %w", a.Namespace, SecretName, err)
		}
		// Publish first: the controller signs nothing with a CA that has not been published.
		if err := a.publish(ctx, k); err != nil {
			return err
		}
	}
	did, err := k.step(now, a.Settings, asked)
	if err != nil {
		return err
	}
	if did != "" {
		if secret.Data, err = k.data(); err != nil {
			return err
		}
		if exists {
			err = a.Client.Update(ctx, &secret)
		} else {
			err = a.Client.Create(ctx, &secret)
		}
		if err != nil {
			return fmt.Errorf("writing Secret %s/%s: %w", a.Namespace, SecretName, err)
		}
		a.Log.WithFields(logrus.Fields{"secret": a.Namespace + "/" + SecretName, "ca": k.active.cert.Subject.CommonName,
			"until": k.active.cert.NotAfter.Format(time.RFC3339)}).Info("the CA of the commands to nodes: " + did)
		if err := a.publish(ctx, k); err != nil {
			return err
		}
	}
	return a.adopt(k, now)
}

// publish writes the certificates of k to the ConfigMap that nodes read.
func (a *Authority) publish(ctx context.Context, k *keys) error {
	var m corev1.ConfigMap
	want := map[string]string{identity.BundleKey: k.bundle()}
	err := a.Reader.Get(ctx, client.ObjectKey{Namespace: a.Namespace, Name: identity.BundleName}, &m)
	switch {
	case apierrors.IsNotFound(err):
		m = corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: a.Namespace, Name: identity.BundleName,
			Labels: map[string]string{"app.kubernetes.io/part-of": "cri-proxy"}}, Data: want}
		err = a.Client.Create(ctx, &m)
	case err == nil && !maps.Equal(m.Data, want):
		m.Data, m.BinaryData = want, nil
		err = a.Client.Update(ctx, &m)
	}
	if err != nil {
		return fmt.Errorf("publishing the CA in ConfigMap %s/%s: %w", a.Namespace, identity.BundleName, err)
	}
	return nil
}

// adopt puts the keys into use in this process.
func (a *Authority) adopt(k *keys, now time.Time) error {
	a.once.Do(a.open)
	a.mu.Lock()
	before, own := a.keys, a.identity
	a.mu.Unlock()
	same := before != nil && before.active.cert.Equal(k.active.cert)
	if own == nil || !same || now.After(own.Leaf.NotBefore.Add(own.Leaf.NotAfter.Sub(own.Leaf.NotBefore)/2)) {
		var err error
		if own, err = newIdentity(k.active, now, a.Settings.Life); err != nil {
			return fmt.Errorf("the controller's own certificate: %w", err)
		}
	}
	a.mu.Lock()
	a.keys, a.identity, a.roots = k, own, k.pool()
	if before == nil {
		close(a.ready)
	}
	a.mu.Unlock()
	a.Metrics.times(k.active.cert.NotAfter, own.Leaf.NotAfter)
	if before != nil && !slices.ContainsFunc(k.trusted(), before.active.cert.Equal) {
		a.Log.Warn("the CA of the commands to nodes has been replaced: nodes enrol anew")
		if a.Replaced != nil {
			a.Replaced()
		}
	}
	return nil
}

// newIdentity makes the controller's client certificate. Its key never leaves the process.
func newIdentity(ca *pair, now time.Time, life time.Duration) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := ca.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: identity.ControllerName},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key.Public(), now, life)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

func (a *Authority) open() { a.ready = make(chan struct{}) }

// await waits until there is a CA.
func (a *Authority) await(ctx context.Context) error {
	a.once.Do(a.open)
	select {
	case <-a.ready:
		return nil
	case <-ctx.Done():
		return errors.New("this controller has no certificate yet: its log says what keeps it")
	}
}

// signer returns the CA that signs now; nil if there is none yet.
func (a *Authority) signer() *pair {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.keys == nil {
		return nil
	}
	return a.keys.active
}

// Current implements [mtls.Identity]. It waits for the first CA.
func (a *Authority) Current(ctx context.Context) (*tls.Certificate, *x509.CertPool, error) {
	if err := a.await(ctx); err != nil {
		return nil, nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.identity, a.roots, nil
}

// Server implements [mtls.Identity]. It accepts only nodes of the cluster, and only a certificate
// that was signed for the present node of that name, and not for an earlier one. Other names in the
// certificate do not count.
func (a *Authority) Server(ctx context.Context, name string, certificate *x509.Certificate) error {
	if certificate != nil {
		if certificate.Subject.CommonName != name {
			return fmt.Errorf("the certificate is that of node %q", certificate.Subject.CommonName)
		}
	}
	var n corev1.Node
	if err := a.Client.Get(ctx, client.ObjectKey{Name: name}, &n); err != nil {
		if apierrors.IsNotFound(err) {
			return fmt.Errorf("node %s is not in the cluster", name)
		}
		return fmt.Errorf("node %s: %w", name, err)
	}
	if certificate == nil {
		return nil
	}
	if uid := identity.NodeUID(certificate); uid != "" && uid != string(n.UID) {
		return fmt.Errorf("the certificate is that of an earlier node %s: the one of now asks for its own as "+
			"soon as it "+
			"notices, within %s", name, noticedIn)
	}
	return nil
}
