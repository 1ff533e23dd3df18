// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/cri-proxy/cri-proxy/api/identity"
)

// test/deploy has the tests with a real API server. Here the fake one fails when a test wants it
// to, and clocks run as the tests say.

const namespace = "own"

// newAPI returns an API server in memory. It calls before ahead of each write; before may refuse
// the write.
func newAPI(t *testing.T, before func(client.Object) error, objects ...client.Object) client.WithWatch {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	check := func(o client.Object) error {
		if before == nil {
			return nil
		}
		return before(o)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&certificatesv1.CertificateSigningRequest{}).
		WithInterceptorFuncs(interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				if err := check(o); err != nil {
					return err
				}
				return c.Create(ctx, o, opts...)
			},
			Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
				if err := check(o); err != nil {
					return err
				}
				return c.Update(ctx, o, opts...)
			},
			// The fake knows no approval. A real API server takes over the conditions only.
			SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object,
				opts ...client.SubResourceUpdateOption) error {
				return c.SubResource("status").Update(ctx, o, opts...)
			},
		}).Build()
}

func newAuthority(c client.Client) (*Authority, *logtest.Hook) {
	log, hook := logtest.NewNullLogger()
	return &Authority{Client: c, Reader: c, Namespace: namespace,
		Settings: Settings{Life: time.Hour, CALife: 100 * time.Hour}, Log: log}, hook
}

func bundle(t *testing.T, c client.Client) string {
	t.Helper()
	var m corev1.ConfigMap
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: identity.BundleName}, &m); err != nil {
		t.Fatal(err)
	}
	return m.Data[identity.BundleKey]
}

func secret(t *testing.T, c client.Client) *corev1.Secret {
	t.Helper()
	s := &corev1.Secret{}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: SecretName}, s); err != nil {
		t.Fatal(err)
	}
	return s
}

func maintain(t *testing.T, a *Authority, now time.Time) {
	t.Helper()
	if err := a.maintain(t.Context(), now); err != nil {
		t.Fatal(err)
	}
}

func own(t *testing.T, a *Authority) *tls.Certificate {
	t.Helper()
	c, _, err := a.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestReplicas(t *testing.T) {
	api := newAPI(t, nil)
	var all []*Authority
	for range 4 {
		a, _ := newAuthority(api)
		all = append(all, a)
	}
	var wg sync.WaitGroup
	for _, a := range all {
		wg.Go(func() {
			for a.maintain(t.Context(), time.Now()) != nil && t.Context().Err() == nil { // somebody was faster
			}
		})
	}
	wg.Wait()
	for _, a := range all {
		if !a.signer().cert.Equal(all[0].signer().cert) {
			t.Error("two CAs")
		}
	}
	if bundle(t, api) != string(encode(all[0].signer().cert)) {
		t.Errorf("published %s", bundle(t, api))
	}
	c := own(t, all[0])
	if c.Leaf.Subject.CommonName != identity.ControllerName || len(c.Leaf.ExtKeyUsage) != 1 ||
		c.Leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("%+v", c.Leaf)
	}
}

func TestOwnCertificateIsRenewed(t *testing.T) {
	a, _ := newAuthority(newAPI(t, nil))
	now := time.Now()
	maintain(t, a, now)
	first := own(t, a)
	maintain(t, a, now.Add(20*time.Minute))
	if own(t, a) != first {
		t.Error("renewed too early")
	}
	maintain(t, a, now.Add(31*time.Minute))
	if own(t, a) == first {
		t.Error("not renewed")
	}
}

func TestRotationByAnnotation(t *testing.T) {
	api := newAPI(t, nil)
	a, _ := newAuthority(api)
	a.Replaced = func() { t.Error("a rotation is no replacement") }
	now := time.Now()
	maintain(t, a, now)
	first := a.signer().cert
	s := secret(t, api)
	s.Annotations = map[string]string{RotateAnnotation: "please"}
	if err := api.Update(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	maintain(t, a, now)
	if both := bundle(t, api); strings.Count(both, "BEGIN") != 2 || !a.signer().cert.Equal(first) {
		t.Fatalf("published %s", both)
	}

	// The leader changes, and the announcement goes on.
	a, _ = newAuthority(api)
	maintain(t, a, now.Add(16*time.Minute))
	second := a.signer().cert
	if second.Equal(first) || strings.Count(bundle(t, api), "BEGIN") != 2 ||
		own(t, a).Leaf.Issuer.CommonName != second.Subject.CommonName {
		t.Fatal("the next CA does not sign")
	}
	maintain(t, a, now.Add(16*time.Minute+a.Settings.Life))
	if strings.Count(bundle(t, api), "BEGIN") != 2 {
		t.Error("the old CA is withdrawn before its certificates have ended")
	}
	maintain(t, a, now.Add(16*time.Minute+a.Settings.Life+2*backdateMost))
	if bundle(t, api) != string(encode(second)) {
		t.Error("the old CA is still trusted")
	}
}

func TestSwitchWaitsForThePublication(t *testing.T) {
	var refuse error
	api := newAPI(t, func(o client.Object) error {
		if _, ok := o.(*corev1.ConfigMap); ok {
			return refuse
		}
		return nil
	})
	a, _ := newAuthority(api)
	now := time.Now()
	maintain(t, a, now)
	first := a.signer().cert
	refuse = errors.New("no")
	s := secret(t, api)
	s.Annotations = map[string]string{RotateAnnotation: "please"}
	if err := api.Update(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := a.maintain(t.Context(), now.Add(time.Duration(i)*time.Hour/2)); err == nil ||
			!strings.Contains(err.Error(), "publishing the CA") {
			t.Fatal(err)
		}
	}
	if k, err := parseKeys(secret(t, api).Data); err != nil || !k.active.cert.Equal(first) {
		t.Errorf("a CA signs that has not been published (%v)", err)
	}
}

func TestSecretIsWhatCounts(t *testing.T) {
	now := time.Now()
	t.Run("deleted", func(t *testing.T) {
		api := newAPI(t, nil)
		a, _ := newAuthority(api)
		replaced := 0
		a.Replaced = func() { replaced++ }
		maintain(t, a, now)
		first := a.signer().cert
		if err := api.Delete(t.Context(), secret(t, api)); err != nil {
			t.Fatal(err)
		}
		maintain(t, a, now.Add(time.Second))
		if strings.Contains(bundle(t, api), string(encode(first))) || replaced != 1 ||
			own(t, a).Leaf.Issuer.CommonName == first.Subject.CommonName {
			t.Errorf("the old CA is still trusted (replaced %d)", replaced)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		api := newAPI(t, nil)
		a, _ := newAuthority(api)
		maintain(t, a, now)
		s := secret(t, api)
		s.Data[dataKey] = []byte("nonsense")
		if err := api.Update(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if err := a.maintain(t.Context(), now); err == nil || !strings.Contains(err.Error(), "is left as it is") {
			t.Fatal(err)
		}
		if string(secret(t, api).Data[dataKey]) != "nonsense" {
			t.Error("it was written over")
		}
		own(t, a) // what it was goes on
	})
	t.Run("published text is put right", func(t *testing.T) {
		api := newAPI(t, nil)
		a, _ := newAuthority(api)
		maintain(t, a, now)
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: identity.BundleName},
			Data: map[string]string{identity.BundleKey: "another CA"}}
		if err := api.Update(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		maintain(t, a, now)
		if bundle(t, api) != string(encode(a.signer().cert)) {
			t.Error("it was not")
		}
	})
	t.Run("long expired", func(t *testing.T) {
		api := newAPI(t, nil)
		a, _ := newAuthority(api)
		maintain(t, a, now)
		first := a.signer().cert
		a, _ = newAuthority(api)
		maintain(t, a, now.Add(1000*time.Hour))
		if a.signer().cert.Equal(first) {
			t.Error("it signs")
		}
	})
}

func TestServer(t *testing.T) {
	a, _ := newAuthority(newAPI(t, nil, nodeOf("node-1")))
	if err := a.Server(t.Context(), "node-1", nil); err != nil {
		t.Error(err)
	}
	if err := a.Server(t.Context(), "removed", nil); err == nil ||
		!strings.Contains(err.Error(), "not in the cluster") {
		t.Error(err)
	}
	for cn, ok := range map[string]bool{"node-1": true, "node-2": false, "": false} {
		c := &x509.Certificate{DNSNames: []string{"node-1"}}
		c.Subject.CommonName = cn
		if err := a.Server(t.Context(), "node-1", c); (err == nil) != ok {
			t.Errorf("certificate of %q: %v", cn, err)
		}
	}
	// Another machine has the name now.
	again := nodeOf("again")
	again.UID = "now"
	b, _ := newAuthority(newAPI(t, nil, again))
	for uid, ok := range map[string]bool{"now": true, "before": false} {
		template, _, no := check(requestOf(t, "again", ecKey(t, elliptic.P256()), nil),
			&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "again", UID: types.UID(uid)}, Status: again.Status})
		if no != nil {
			t.Fatal(no.message)
		}
		if err := b.Server(t.Context(), "again", template); (err == nil) != ok || err != nil &&
			!strings.Contains(err.Error(), "an earlier node again") {
			t.Errorf("certificate of the Node with UID %s: %v", uid, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := a.Current(ctx); err == nil || !strings.Contains(err.Error(), "no certificate yet") {
		t.Error(err)
	}
}

func TestSigner(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	approved := certificatesv1.CertificateSigningRequestCondition{Type: certificatesv1.CertificateApproved,
		Status: corev1.ConditionTrue}
	seconds := int32(600)
	for _, tt := range []struct {
		name   string
		csr    func(*x509.CertificateRequest)
		change func(*certificatesv1.CertificateSigningRequest)
		want   string // condition and reason
		event  string
	}{
		{name: "a node", want: "Approved NodeVerified"},
		{name: "a shorter life",
			change: func(r *certificatesv1.CertificateSigningRequest) { r.Spec.ExpirationSeconds = &seconds },
			want:   "Approved NodeVerified"},
		{name: "approved by hand", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Status.Conditions = append(r.Status.Conditions, approved)
		}, want: "Approved "},
		{name: "not a node", change: func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Username = "eve" },
			want: "Denied NotANode", event: "Warning NotANode the requester is \"eve\""},
		{name: "another name", csr: func(c *x509.CertificateRequest) { c.Subject.CommonName = "node-2" },
			want: "Denied WrongName", event: "Warning WrongName the subject is \"CN=node-2\""},
		{name: "no such node",
			change: func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Username = "system:node:removed" },
			want:   "Denied NoSuchNode", event: "Warning NoSuchNode"},
		{name: "bad, and approved by hand", csr: func(c *x509.CertificateRequest) { c.Subject.CommonName = "node-2" },
			change: func(r *certificatesv1.CertificateSigningRequest) {
				r.Status.Conditions = append(r.Status.Conditions, approved)
			}, want: "Approved ,Failed WrongName", event: "Warning WrongName"},
		{name: "another signer", change: func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.SignerName = "kubernetes.io/kubelet-serving"
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := requestOf(t, "node-1", key, tt.csr)
			if tt.change != nil {
				tt.change(r)
			}
			api := newAPI(t, nil, nodeOf("node-1"), r)
			a, hook := newAuthority(api)
			recorder := events.NewFakeRecorder(10)
			s := &Signer{Authority: a, Recorder: recorder}
			request := ctrl.Request{NamespacedName: client.ObjectKeyFromObject(r)}
			if result, err := s.Reconcile(t.Context(), request); err != nil ||
				tt.want != "" && result.RequeueAfter == 0 {
				t.Fatalf("before there is a CA: %+v %v", result, err)
			}
			maintain(t, a, time.Now())
			for range 2 {
				if _, err := s.Reconcile(t.Context(), request); err != nil {
					t.Fatal(err)
				}
			}
			if err := api.Get(t.Context(), request.NamespacedName, r); err != nil {
				t.Fatal(err)
			}
			var conditions []string
			for _, c := range r.Status.Conditions {
				conditions = append(conditions, string(c.Type)+" "+c.Reason)
			}
			if got := strings.Join(conditions, ","); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
			if signed := len(r.Status.Certificate) > 0; signed != (strings.HasPrefix(tt.want, "Approved") &&
				tt.event == "") {
				t.Errorf("signed: %t", signed)
			} else if signed {
				certs, err := parseCerts(r.Status.Certificate)
				if err != nil || len(certs) != 1 || certs[0].CheckSignatureFrom(a.signer().cert) != nil {
					t.Fatalf("%v %v", certs, err)
				}
				if life := time.Until(certs[0].NotAfter); r.Spec.ExpirationSeconds != nil && life > 10*time.Minute ||
					life > time.Hour || life < 9*time.Minute {
					t.Errorf("good for %s", life)
				}
			}
			select {
			case e := <-recorder.Events:
				if tt.event == "" || !strings.HasPrefix(e, tt.event) {
					t.Errorf("event %q", e)
				}
			default:
				if tt.event != "" {
					t.Error("no event")
				}
			}
			denied := false
			for _, e := range hook.AllEntries() {
				denied = denied ||
					e.Level == logrus.WarnLevel && strings.HasPrefix(e.Message, "node certificate denied")
			}
			if denied != (tt.event != "") {
				t.Errorf("denial logged: %t", denied)
			}
		})
	}
}
