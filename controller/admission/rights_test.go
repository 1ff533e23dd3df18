// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	logtest "github.com/sirupsen/logrus/hooks/test"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/yaml"

	"github.com/cri-proxy/cri-proxy/api/scheme"
)

// rightsObjects returns the objects of deploy/rights.
func rightsObjects(t *testing.T) []client.Object {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "rights", "policies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var all []client.Object
	for _, document := range strings.Split(string(text), "\n---\n") {
		var o client.Object = &admissionv1.ValidatingAdmissionPolicy{}
		if strings.Contains(document, "kind: ValidatingAdmissionPolicyBinding\n") {
			o = &admissionv1.ValidatingAdmissionPolicyBinding{}
		}
		if err := yaml.UnmarshalStrict([]byte(document), o); err != nil {
			t.Fatal(err)
		}
		all = append(all, o)
	}
	return all
}

// TestRightsAreLookedFor: the manifests have enough, and Rights reports once what they lack.
func TestRightsAreLookedFor(t *testing.T) {
	const rollouts = "inplacerollout.rights.cri-proxy.io"
	for _, tt := range []struct {
		name   string
		change func(o client.Object) bool // false: it is not there
		count  float64
		says   string // empty: all is well
	}{
		{name: "as in the manifests", change: func(client.Object) bool { return true }},
		{name: "none", change: func(client.Object) bool { return false }, count: 3,
			says: "whoever may create InPlaceRollouts, ContainerRecreateRequests, ImagePullJobs and " +
				"ImageListPullJobs in a " +
				"namespace has the controller's rights there: there is no ValidatingAdmissionPolicy " + rollouts},
		{name: "a policy without its binding", count: 1, says: "there is no ValidatingAdmissionPolicyBinding " +
			rollouts,
			change: func(o client.Object) bool {
				_, binding := o.(*admissionv1.ValidatingAdmissionPolicyBinding)
				return !binding || o.GetName() != rollouts
			}},
		{name: "warned only", count: 1, says: "does not deny", change: func(o client.Object) bool {
			if b, ok := o.(*admissionv1.ValidatingAdmissionPolicyBinding); ok && o.GetName() == rollouts {
				b.Spec.ValidationActions = []admissionv1.ValidationAction{admissionv1.Warn}
			}
			return true
		}},
		{name: "of some namespaces", count: 1, says: "leaves some out", change: func(o client.Object) bool {
			if b, ok := o.(*admissionv1.ValidatingAdmissionPolicyBinding); ok && o.GetName() == rollouts {
				b.Spec.MatchResources = &admissionv1.MatchResources{
					NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}}
			}
			return true
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			scheme, err := scheme.New()
			if err != nil {
				t.Fatal(err)
			}
			var there []client.Object
			for _, o := range rightsObjects(t) {
				if tt.change(o) {
					there = append(there, o)
				}
			}
			log, hook := logtest.NewNullLogger()
			r, err := NewRights(fake.NewClientBuilder().WithScheme(scheme).WithObjects(there...).Build(), log,
				prometheus.NewRegistry())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				r.look(t.Context())
			}
			if got := testutil.ToFloat64(r.gauge); got != tt.count {
				t.Errorf("%v policies are missing, want %v", got, tt.count)
			}
			entries := hook.AllEntries()
			if tt.says == "" && len(entries) != 0 || tt.says != "" &&
				(len(entries) != 1 || !strings.Contains(entries[0].Message, tt.says)) {
				t.Errorf("told %v, want %q", entries, tt.says)
			}
		})
	}
}

// TestRightsUnknown: an API server that does not answer changes nothing in what Rights reports. An
// API server that has no such policies does.
func TestRightsUnknown(t *testing.T) {
	scheme, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	var fails error
	from := fake.NewClientBuilder().WithScheme(scheme).WithInterceptorFuncs(interceptor.Funcs{
		Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return fails
		},
	}).Build()
	log, hook := logtest.NewNullLogger()
	r, err := NewRights(from, log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	fails = apierrors.NewForbidden(admissionv1.Resource("validatingadmissionpolicies"), "x", nil)
	r.look(t.Context())
	if e := hook.LastEntry(); e == nil ||
		e.Message != "it is not known whether users are asked for rights of their own" ||
		testutil.ToFloat64(r.gauge) != 0 {
		t.Errorf("%v", e)
	}
	fails = &apimeta.NoKindMatchError{GroupKind: admissionv1.SchemeGroupVersion.WithKind("ValidatingAdmissionPolicy").
		GroupKind()}
	r.look(t.Context())
	if e := hook.LastEntry(); e == nil ||
		!strings.Contains(e.Message, "the API server knows no ValidatingAdmissionPolicy") ||
		testutil.ToFloat64(r.gauge) != 3 {
		t.Errorf("%v", e)
	}
}
