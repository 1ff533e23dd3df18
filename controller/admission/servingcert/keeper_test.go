// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package servingcert

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

const (
	namespace = "cri-proxy-system"
	validity  = 4 * time.Hour
	// noticed is how long an API server takes here to notice a changed configuration.
	noticed = 2 * time.Second
	step    = 500 * time.Millisecond
)

// cluster is an API server with replicas of the controller. It lives in a synctest bubble.
type cluster struct {
	t        *testing.T
	api      client.Client
	replicas map[string]*replica
	// seen has the bundles of both configurations, the newest last, with the time of each.
	seen []observation
	// verified has the certificates and bundles that go together.
	verified map[string]bool
}

type observation struct {
	at      time.Time
	bundles [][]byte
}

type replica struct {
	*Keeper
	due time.Time
	// err is the error of the last look.
	err error
}

func newCluster(t *testing.T) *cluster {
	one := admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: namespace, Name: Service}}
	scheme := runtime.NewScheme()
	must(t, corev1.AddToScheme(scheme))
	must(t, admissionv1.AddToScheme(scheme))
	return &cluster{t: t, replicas: map[string]*replica{}, verified: map[string]bool{}, api: fake.NewClientBuilder().
		WithScheme(scheme).WithObjects(
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: Secret}},
		&admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: Configuration},
			Webhooks: []admissionv1.MutatingWebhook{{Name: "m.example.com", ClientConfig: one}}},
		&admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: Configuration},
			Webhooks: []admissionv1.ValidatingWebhook{{Name: "a.example.com", ClientConfig: one},
				{Name: "b.example.com", ClientConfig: one}}},
	).Build()}
}

func (c *cluster) start(name string) *replica {
	log := logrus.New()
	log.SetOutput(io.Discard)
	r := &replica{Keeper: &Keeper{Client: c.api, Namespace: namespace, Validity: validity, Log: log}, due: time.Now()}
	c.replicas[name] = r
	return r
}

// run lets time pass. Replicas look when they said that they would, and when something has changed.
// Whenever a replica is ready, two API servers must trust what it shows: one that has noticed each
// change, and one that has not noticed the last changes.
func (c *cluster) run(d time.Duration) {
	c.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(c.pause(end)) {
		for _, r := range c.replicas {
			if time.Now().Before(r.due) {
				continue
			}
			before := c.state()
			result, err := r.Reconcile(c.t.Context(), reconcile.Request{})
			r.err, r.due = err, time.Now().Add(result.RequeueAfter)
			if err != nil {
				r.due = time.Now().Add(10 * time.Second)
			}
			if c.state() != before {
				c.wake()
			}
		}
		c.seen = append(c.seen, observation{time.Now(), c.bundles()})
		for len(c.seen) > 1 && time.Since(c.seen[1].at) >= noticed {
			c.seen = c.seen[1:]
		}
		for name, r := range c.replicas {
			c.check(name, r)
		}
	}
}

// pause returns how long nothing happens: a step, or more when the API servers have noticed all
// writes.
func (c *cluster) pause(end time.Time) time.Duration {
	if len(c.seen) > 0 && joined(c.seen[0].bundles) != joined(c.bundles()) {
		return step
	}
	pause := time.Until(end)
	for _, r := range c.replicas {
		pause = min(pause, time.Until(r.due))
	}
	return max(pause, step)
}

func (c *cluster) wake() {
	for _, r := range c.replicas {
		r.due = time.Now()
	}
}

// state returns everything that is stored.
func (c *cluster) state() string {
	data := c.secret().Data
	return string(data[corev1.TLSCertKey]) + string(data[corev1.TLSPrivateKeyKey]) +
		string(data[caKey]) + joined(c.bundles())
}

func joined(texts [][]byte) string { return string(bytes.Join(texts, []byte("|"))) }

func (c *cluster) secret() *corev1.Secret {
	c.t.Helper()
	var s corev1.Secret
	if err := c.api.Get(c.t.Context(), client.ObjectKey{Namespace: namespace, Name: Secret},
		&s); client.IgnoreNotFound(err) != nil {
		c.t.Fatal(err)
	}
	return &s
}

func (c *cluster) bundles() [][]byte {
	c.t.Helper()
	k := &Keeper{Client: c.api}
	all, err := k.read(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	var bundles [][]byte
	for _, o := range all {
		for _, w := range o.clients {
			bundles = append(bundles, w.CABundle)
		}
	}
	return bundles
}

// check checks what a replica shows that API servers may call.
func (c *cluster) check(name string, r *replica) {
	c.t.Helper()
	if r.Ready(nil) != nil {
		return
	}
	shown, err := r.GetCertificate(nil)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, view := range c.seen {
		for i, b := range view.bundles {
			key := shown.Leaf.SerialNumber.String() + string(b)
			if c.verified[key] && time.Now().Before(shown.Leaf.NotAfter) {
				continue
			}
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(b)
			if _, err := shown.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: Service + "." + namespace + ".svc",
				CurrentTime: time.Now()}); err != nil {
				c.t.Fatalf("what %s shows is not trusted by webhook %d as it was %s ago: %v", name, i,
					time.Since(view.at), err)
			}
			c.verified[key] = true
		}
	}
}

func (c *cluster) serial(name string) string {
	c.t.Helper()
	p := c.replicas[name].current()
	if p == nil {
		c.t.Fatalf("%s shows nothing", name)
	}
	return p.cert.Leaf.SerialNumber.String()
}

func (c *cluster) trusted() int {
	return len(parseBundle(time.Now(), c.bundles()[0]))
}

// bubble runs a test with two replicas that have come up.
func bubble(t *testing.T, test func(*cluster)) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.start("a")
		c.run(3 * time.Second)
		c.start("b")
		c.run(30 * time.Second)
		for name, r := range c.replicas {
			if err := r.Ready(nil); err != nil {
				t.Fatalf("%s is not ready: %v", name, err)
			}
		}
		if c.serial("a") != c.serial("b") || c.trusted() != 1 {
			t.Fatalf("replicas show %s and %s, and %d CAs are trusted", c.serial("a"), c.serial("b"), c.trusted())
		}
		test(c)
	})
}

// TestOvertaken: while one replica is between two calls, another one makes a new certificate. What
// the first replica then writes must not remove the new CA.
func TestOvertaken(t *testing.T) {
	for _, call := range []string{"get 1", "get 2", "get 3", "patch 1", "patch 2"} {
		t.Run(call, func(t *testing.T) {
			bubble(t, func(c *cluster) {
				c.t = t
				a, b := c.replicas["a"], c.replicas["b"]
				for _, o := range []client.Object{&admissionv1.MutatingWebhookConfiguration{},
					&admissionv1.ValidatingWebhookConfiguration{}} {
					must(t, c.api.Get(t.Context(), client.ObjectKey{Name: Configuration}, o))
					switch o := o.(type) { // so that there is something to write
					case *admissionv1.MutatingWebhookConfiguration:
						o.Webhooks[0].ClientConfig.CABundle = nil
					case *admissionv1.ValidatingWebhookConfiguration:
						o.Webhooks[0].ClientConfig.CABundle = nil
					}
					must(t, c.api.Update(t.Context(), o))
				}
				overtaken := false
				a.Client = &hookedClient{Client: c.api, calls: map[string]int{}, before: func(now string) {
					if now == call {
						overtaken = true
						c.change(func(s *corev1.Secret) { s.Data = nil })
						if _, err := b.Reconcile(t.Context(), reconcile.Request{}); err != nil {
							t.Fatal(err)
						}
					}
				}}
				if _, err := a.Reconcile(t.Context(), reconcile.Request{}); err != nil || !overtaken {
					t.Fatal(err, overtaken)
				}
				made, err := parsePair(c.secret().Data[corev1.TLSCertKey], c.secret().Data[corev1.TLSPrivateKeyKey])
				must(t, err)
				for i, text := range c.bundles() {
					if !parseBundle(time.Now(), text).has(made.ca) {
						t.Errorf("webhook %d does not trust the new certificate any more", i)
					}
				}
				c.wake()
				c.run(time.Minute)
				if c.serial("a") != c.serial("b") {
					t.Error("they show different certificates")
				}
			})
		})
	}
}

func TestBothAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		// Both have read the empty Secret when the first one writes.
		late := c.start("late")
		late.Client = &hookedClient{Client: c.api, calls: map[string]int{}, before: func(now string) {
			if now == "update 1" {
				if _, err := c.start("first").Reconcile(t.Context(), reconcile.Request{}); err != nil {
					t.Fatal(err)
				}
			}
		}}
		c.run(time.Minute)
		if c.serial("late") != c.serial("first") {
			t.Error("they show different certificates")
		}
	})
}

// hookedClient announces each call, such as "get 2" for the second get.
type hookedClient struct {
	client.Client
	calls  map[string]int
	before func(call string)
}

func (h *hookedClient) tell(verb string) {
	h.calls[verb]++
	h.before(fmt.Sprint(verb, " ", h.calls[verb]))
}

func (h *hookedClient) Get(ctx context.Context, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
	h.tell("get")
	return h.Client.Get(ctx, key, o, opts...)
}

func (h *hookedClient) Update(ctx context.Context, o client.Object, opts ...client.UpdateOption) error {
	h.tell("update")
	return h.Client.Update(ctx, o, opts...)
}

func (h *hookedClient) Patch(ctx context.Context, o client.Object, p client.Patch, opts ...client.PatchOption) error {
	h.tell("patch")
	return h.Client.Patch(ctx, o, p, opts...)
}

func TestRenewal(t *testing.T) {
	bubble(t, func(c *cluster) {
		seen := map[string]bool{}
		for range 3 {
			before := c.serial("a")
			seen[before] = true
			c.run(time.Until(c.replicas["a"].current().due()) + settleFor/2)
			if c.serial("a") != before || c.trusted() != 2 {
				c.t.Fatalf("right after the renewal: a new one is shown already, or %d CAs are trusted", c.trusted())
			}
			c.run(settleFor)
			if a, b := c.serial("a"), c.serial("b"); a != b || seen[a] {
				c.t.Fatalf("replicas show %s and %s, and before it was %s", a, b, before)
			}
			c.run(retainFor + time.Minute)
			if c.trusted() != 1 {
				c.t.Errorf("%d CAs are trusted an hour later", c.trusted())
			}
		}
	})
}

func TestTrouble(t *testing.T) {
	tests := []struct {
		name    string
		trouble func(*cluster)
		renewed bool
	}{
		{"the Secret is emptied", func(c *cluster) { c.change(func(s *corev1.Secret) { s.Data = nil }) }, true},
		{"the Secret has no key",
			func(c *cluster) { c.change(func(s *corev1.Secret) { delete(s.Data, corev1.TLSPrivateKeyKey) }) }, true},
		{"the Secret has nonsense", func(c *cluster) {
			c.change(func(s *corev1.Secret) {
				s.Data[corev1.TLSCertKey], s.Data[caKey] = []byte("x"),
					[]byte("-----BEGIN y")
			})
		}, true},
		{"the certificate in the Secret is for other names", func(c *cluster) {
			other, err := generate([]string{"other.svc"}, validity)
			must(c.t, err)
			c.change(func(s *corev1.Secret) {
				s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey] = other.certPEM, other.keyPEM
			})
		}, true},
		{"the CAs in the Secret are gone",
			func(c *cluster) { c.change(func(s *corev1.Secret) { delete(s.Data, caKey) }) },
			false},
		{"somebody has put other CAs into a configuration", func(c *cluster) {
			var o admissionv1.ValidatingWebhookConfiguration
			must(c.t, c.api.Get(c.t.Context(), client.ObjectKey{Name: Configuration}, &o))
			o.Webhooks[1].ClientConfig.CABundle = append(bytes.Clone(o.Webhooks[0].ClientConfig.CABundle), "# mine"...)
			must(c.t, c.api.Update(c.t.Context(), &o))
		}, false},
		{"emptied three times in a row", func(c *cluster) {
			for range 3 {
				c.change(func(s *corev1.Secret) { s.Data = nil })
				c.run(settleFor / 2)
			}
		}, true},
		{"emptied, and a third replica comes", func(c *cluster) {
			c.change(func(s *corev1.Secret) { s.Data = nil })
			c.run(2 * step)
			c.start("c")
		}, true},
		{"emptied, and a replica restarts at once", func(c *cluster) {
			c.change(func(s *corev1.Secret) { s.Data = nil })
			c.start("a")
		}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(c *cluster) {
				c.t = t
				before := c.serial("b")
				tt.trouble(c)
				c.wake()
				c.run(time.Minute)
				for name, r := range c.replicas {
					if err := r.Ready(nil); err != nil || c.serial(name) != c.serial("b") {
						t.Errorf("%s: %v, shows %s instead of %s", name, err, c.serial(name), c.serial("b"))
					}
				}
				if (c.serial("b") != before) != tt.renewed {
					t.Errorf("%s before, %s after", before, c.serial("b"))
				}
				c.run(retainFor + time.Minute)
				if c.trusted() != 1 {
					t.Errorf("%d CAs are trusted an hour later", c.trusted())
				}
			})
		})
	}
}

func (c *cluster) change(how func(*corev1.Secret)) {
	c.t.Helper()
	s := c.secret()
	how(s)
	must(c.t, c.api.Update(c.t.Context(), s))
}

func TestSecretDeleted(t *testing.T) {
	bubble(t, func(c *cluster) {
		before := c.serial("a")
		must(c.t, c.api.Delete(c.t.Context(), c.secret()))
		c.wake()
		third := c.start("c")
		c.run(time.Minute)
		for _, r := range c.replicas {
			if r.err == nil || !strings.Contains(r.err.Error(), "apply the manifests again") {
				c.t.Errorf("error: %v", r.err)
			}
		}
		if err := c.replicas["a"].Ready(nil); err != nil || c.serial("a") != before {
			c.t.Errorf("what is shown does not stay: %v", err)
		}
		if err := third.Ready(nil); err == nil ||
			!strings.Contains(err.Error(),
				"there is no Secret cri-controller-webhook-tls in namespace cri-proxy-system") {
			c.t.Errorf("the third one's readiness: %v", err)
		}
		must(c.t,
			c.api.Create(c.t.Context(),
				&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: Secret}}))
		c.run(time.Minute)
		if c.serial("a") == before || c.serial("a") != c.serial("c") || third.Ready(nil) != nil {
			c.t.Error("it was not made anew for all")
		}
	})
}

// TestLongAway: all replicas were away until after the end of the certificate.
func TestLongAway(t *testing.T) {
	bubble(t, func(c *cluster) {
		before := c.serial("a")
		time.Sleep(2 * validity)
		if c.replicas["a"].Ready(nil) == nil {
			c.t.Error("ready with a certificate that has expired")
		}
		c.seen = nil
		c.replicas = map[string]*replica{}
		c.start("a")
		c.run(time.Second)
		if c.serial("a") == before || c.trusted() != 1 {
			c.t.Error("not made anew at once")
		}
		c.run(settleFor)
		must(c.t, c.replicas["a"].Ready(nil))
	})
}

// TestCutOff: a replica that could not look for so long that API servers no longer trust its CA
// shows the new certificate at once.
func TestCutOff(t *testing.T) {
	bubble(t, func(c *cluster) {
		cut := c.replicas["b"]
		delete(c.replicas, "b")
		c.run(time.Until(cut.current().due()) + retainFor + time.Minute)
		if _, err := cut.Reconcile(c.t.Context(), reconcile.Request{}); err != nil {
			c.t.Fatal(err)
		}
		c.replicas["b"] = cut
		c.run(time.Second)
		if c.serial("a") != c.serial("b") {
			c.t.Error("it shows the old one still")
		}
	})
}

func TestNoConfigurations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		must(t, c.api.Delete(t.Context(),
			&admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: Configuration}}))
		r := c.start("a")
		c.run(settleFor + time.Second)
		if err := r.Ready(nil); err != nil || c.trusted() != 1 {
			t.Errorf("%v, %d CAs", err, c.trusted())
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
