// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package servingcert

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

// Names of the objects in deploy. The permissions are for these names.
const (
	// Secret holds the certificate.
	Secret = "cri-controller-webhook-tls"
	// Service is the Service that the API server calls.
	Service = "cri-controller-webhook"
	// Configuration is the name of both webhook configurations.
	Configuration = "cri-controller"
)

const (
	// caKey is the key of the CAs in the Secret, as cert-manager names it.
	caKey = "ca.crt"
	// settleFor is how long API servers get to notice a changed configuration. They watch the
	// configurations, so it takes them milliseconds.
	settleFor = 5 * time.Second
	// retainFor is how long the CA of the previous certificate is kept: much longer than a replica
	// can fail to see the new one.
	retainFor = time.Hour
	// lookAgain is how often the Keeper looks at everything without an event.
	lookAgain = 5 * time.Minute
	// soon is how soon the Keeper looks again after somebody else has written first.
	soon = 200 * time.Millisecond
	// DefaultValidity is how long a certificate is valid.
	DefaultValidity = 90 * 24 * time.Hour
)

// Keeper keeps the certificate. With the exported fields set, its zero value is ready for use.
type Keeper struct {
	// Client reads past the cache, and writes.
	Client client.Client
	// Namespace of Secret and Service.
	Namespace string
	// Validity of a certificate.
	Validity time.Duration
	// Log must be set.
	Log logrus.FieldLogger

	mu sync.Mutex
	// shown is the certificate that this replica shows; nil before the first look.
	shown *pair
	// next will be shown settleFor after trustedSince; nil if no certificate waits for that.
	next         *pair
	trustedSince time.Time
	// trustedFrom is when API servers began to know the CA of the first certificate that was shown;
	// zero before.
	trustedFrom time.Time
	// trouble is why the last look failed.
	trouble error
}

// CacheOptions restricts what the manager watches to the objects that the Keeper may see.
func CacheOptions(o *cache.Options, namespace string) {
	if o.ByObject == nil {
		o.ByObject = map[client.Object]cache.ByObject{}
	}
	o.ByObject[&corev1.Secret{}] = cache.ByObject{
		Namespaces: map[string]cache.Config{
			namespace: {FieldSelector: fields.OneTermEqualSelector("metadata.name", Secret)}}}
	o.ByObject[&admissionv1.MutatingWebhookConfiguration{}] = cache.ByObject{
		Field: fields.OneTermEqualSelector("metadata.name", Configuration)}
	o.ByObject[&admissionv1.ValidatingWebhookConfiguration{}] = cache.ByObject{
		Field: fields.OneTermEqualSelector("metadata.name", Configuration)}
}

// SetupWithManager adds the Keeper to a manager whose cache has CacheOptions. The Keeper works in
// each replica, whether the replica leads or not.
func (k *Keeper) SetupWithManager(m manager.Manager) error {
	here := reconcile.Request{NamespacedName: client.ObjectKey{Namespace: k.Namespace, Name: Secret}}
	enqueue := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{here}
	})
	all := false
	return builder.ControllerManagedBy(m).
		Named("webhook-certificate").
		WatchesMetadata(&corev1.Secret{}, enqueue).
		WatchesMetadata(&admissionv1.MutatingWebhookConfiguration{}, enqueue).
		WatchesMetadata(&admissionv1.ValidatingWebhookConfiguration{}, enqueue).
		WatchesRawSource(
			source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
				q.Add(here) // also when there is nothing to watch
				return nil
			})).
		WithOptions(controller.Options{
			NeedLeaderElection: &all, MaxConcurrentReconciles: 1,
			RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](soon, time.Minute),
		}).
		Complete(k)
}

// GetCertificate is for tls.Config.
func (k *Keeper) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.shown == nil {
		return nil, errors.New("there is no certificate yet")
	}
	return k.shown.cert, nil
}

// Ready is a healthz.Checker: the API server can call the replica when the replica has a
// certificate that the API server trusts.
func (k *Keeper) Ready(*http.Request) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.shown != nil && !time.Now().Before(k.trustedFrom) && time.Now().Before(k.shown.cert.Leaf.NotAfter):
		return nil
	case k.trouble != nil:
		return k.trouble
	}
	return errors.New("the webhooks have no certificate that the API server trusts yet")
}

// names returns the names by which the API server may call the webhooks.
func (k *Keeper) names() []string {
	full := Service + "." + k.Namespace + ".svc"
	return []string{full, Service + "." + k.Namespace, full + ".cluster.local"}
}

// Reconcile brings the Secret, the configurations and the shown certificate together.
func (k *Keeper) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	wait, err := k.look(ctx)
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: soon}, nil
	}
	k.mu.Lock()
	k.trouble = err
	k.mu.Unlock()
	return reconcile.Result{RequeueAfter: wait}, err
}

// look does what is due and says when to look again. It reads the configurations before the Secret:
// whoever changes the Secret writes the configurations later. So what look puts into the
// configurations is never older than what they hold, or the write conflicts.
func (k *Keeper) look(ctx context.Context) (time.Duration, error) {
	now := time.Now()
	configurations, err := k.read(ctx)
	if err != nil {
		return 0, err
	}
	var secret corev1.Secret
	err = k.Client.Get(ctx, client.ObjectKey{Namespace: k.Namespace, Name: Secret}, &secret)
	if apierrors.IsNotFound(err) {
		return 0, fmt.Errorf("there is no Secret %s in namespace %s for the certificate of the webhooks: "+
			"apply the manifests again, it comes with them, empty", Secret, k.Namespace)
	} else if err != nil {
		return 0, err
	}
	have, err := parsePair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err == nil {
		err = have.usable(k.names(), now)
	}
	trust := parseBundle(now, secret.Data[caKey])
	switch {
	case err != nil || !now.Before(have.due()):
		// The configurations keep the CA that replicas show, whether it is in the Secret or not.
		for _, c := range configurations {
			for _, w := range c.clients {
				trust = trust.and(parseBundle(now, w.CABundle))
			}
		}
		if shown := k.current(); shown != nil {
			trust = trust.with(shown.ca)
		}
		if have, err = generate(k.names(), k.Validity); err != nil {
			return 0, err
		}
		trust = trust.with(have.ca)
		if err := k.write(ctx, &secret, have, trust); err != nil {
			return 0, err
		}
		k.Log.WithField("until", have.cert.Leaf.NotAfter.Format(time.RFC3339)).
			Info("made a certificate for the webhooks")
	case !trust.has(have.ca):
		trust = trust.with(have.ca)
		if err := k.write(ctx, &secret, have, trust); err != nil {
			return 0, err
		}
	case !now.Before(have.made().Add(retainFor)) && len(trust) > 1:
		trust = bundle{have.ca}
		if err := k.write(ctx, &secret, have, trust); err != nil {
			return 0, err
		}
		k.Log.Info("the CAs of earlier certificates of the webhooks are not trusted any more")
	}
	text, err := trust.pem()
	if err != nil {
		return 0, err
	}
	announced := have.made()
	for _, c := range configurations {
		changed, err := c.trust(ctx, k.Client, text)
		if err != nil {
			return 0, err
		}
		if changed {
			announced = now
		}
	}
	wait := k.show(have, trust, announced, now)
	for _, at := range []time.Time{have.due(), have.made().Add(retainFor)} {
		if left := at.Sub(now); left > 0 {
			wait = min(wait, left)
		}
	}
	return wait, nil
}

func (k *Keeper) current() *pair {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.shown
}

// show shows a pair as soon as API servers know its CA, and says when to look again. Until then it
// goes on showing the previous pair, if API servers still trust that. announced is when the CA was
// written into the configurations, at the latest.
func (k *Keeper) show(have *pair, trust bundle, announced, now time.Time) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case have.same(k.shown):
		k.next = nil
		return lookAgain
	case k.shown == nil:
		k.trustedFrom = announced.Add(settleFor)
	case k.shown != nil && now.Before(k.shown.cert.Leaf.NotAfter) && trust.has(k.shown.ca):
		if !have.same(k.next) {
			k.next, k.trustedSince = have, now
		}
		if left := k.trustedSince.Add(settleFor).Sub(now); left > 0 {
			return left
		}
	}
	k.shown, k.next = have, nil
	k.Log.WithField("serial", have.cert.Leaf.SerialNumber.String()).Info("the webhooks show the certificate")
	return lookAgain
}

// write puts a pair into the Secret, unless somebody else has written in between.
func (k *Keeper) write(ctx context.Context, secret *corev1.Secret, p *pair, trust bundle) error {
	text, err := trust.pem()
	if err != nil {
		return err
	}
	secret.Data = map[string][]byte{corev1.TLSCertKey: p.certPEM, corev1.TLSPrivateKeyKey: p.keyPEM, caKey: text}
	return k.Client.Update(ctx, secret)
}

// configuration is a webhook configuration, mutating or validating.
type configuration struct {
	object  client.Object
	clients []*admissionv1.WebhookClientConfig
}

// read reads the configurations that exist.
func (k *Keeper) read(ctx context.Context) ([]configuration, error) {
	var all []configuration
	key := client.ObjectKey{Name: Configuration}
	mutating, validating := &admissionv1.MutatingWebhookConfiguration{}, &admissionv1.ValidatingWebhookConfiguration{}
	if err := k.Client.Get(ctx, key, mutating); err == nil {
		c := configuration{object: mutating}
		for i := range mutating.Webhooks {
			c.clients = append(c.clients, &mutating.Webhooks[i].ClientConfig)
		}
		all = append(all, c)
	} else if !apierrors.IsNotFound(err) {
		return nil, err
	}
	if err := k.Client.Get(ctx, key, validating); err == nil {
		c := configuration{object: validating}
		for i := range validating.Webhooks {
			c.clients = append(c.clients, &validating.Webhooks[i].ClientConfig)
		}
		all = append(all, c)
	} else if !apierrors.IsNotFound(err) {
		return nil, err
	}
	return all, nil
}

// trust sets the CAs in all webhooks of a configuration, unless somebody else has written in
// between.
func (c *configuration) trust(ctx context.Context, api client.Client, bundle []byte) (changed bool, err error) {
	before := c.object.DeepCopyObject().(client.Object)
	for _, w := range c.clients {
		if !bytes.Equal(w.CABundle, bundle) {
			w.CABundle, changed = bundle, true
		}
	}
	if !changed {
		return false, nil
	}
	return true, api.Patch(ctx, c.object, client.StrategicMergeFrom(before, client.MergeFromWithOptimisticLock{}))
}
