// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
)

// testPermissions asks as `kubectl auth can-i
// --as=system:serviceaccount:cri-proxy-system:cri-controller` does. What is granted has its list in
// docs/RBAC.md; here is what must not be.
func testPermissions(t *testing.T) {
	const everywhere, own = "default", "cri-proxy-system"
	for _, tt := range []struct {
		namespace, verbs, what string // what is resource[/subresource][.group]
		name                   string
		allowed                bool
	}{
		// Without these the test would pass with no permissions at all.
		{everywhere, "get list watch patch", "pods", "", true},
		{everywhere, "get", "secrets", "", true},
		{everywhere, "get list watch patch delete create", "inplacerollouts.cri-proxy.io", "", true},
		{own, "get update", "leases.coordination.k8s.io", "cri-controller", true},

		{own, "get list watch update", "secrets", "cri-controller-webhook-tls", true},
		{"", "get list watch patch", "mutatingwebhookconfigurations.admissionregistration.k8s.io",
			"cri-controller", true},
		{"", "get list watch patch", "validatingwebhookconfigurations.admissionregistration.k8s.io",
			"cri-controller", true},
		{"", "get", "mutatingwebhookconfigurations.admissionregistration.k8s.io",
			"kruise-mutating-webhook-configuration", true},
		{"", "get", "validatingwebhookconfigurations.admissionregistration.k8s.io",
			"kruise-validating-webhook-configuration", true},

		{everywhere, "list watch create update patch delete deletecollection", "secrets", "", false},
		{own, "list watch update patch delete", "secrets", "", false},
		{own, "create", "secrets", "", true}, // no name can be given to create
		{own, "get update", "secrets", "cri-proxy-ca", true},
		{own, "get update", "configmaps", "cri-proxy-ca", true},
		{own, "update patch delete", "configmaps", "another", false},
		{own, "patch delete", "configmaps", "cri-proxy-ca", false},
		{"", "approve sign", "signers.certificates.k8s.io", "cri-proxy.io/node", true},
		{"", "approve sign", "signers.certificates.k8s.io", "kubernetes.io/kube-apiserver-client-kubelet", false},
		{"", "approve sign", "signers.certificates.k8s.io", "kubernetes.io/kube-apiserver-client", false},
		{"", "approve sign attest", "signers.certificates.k8s.io", "", false},
		{"", "create update patch delete", "certificatesigningrequests.certificates.k8s.io", "", false},
		{own, "patch delete", "secrets", "cri-controller-webhook-tls", false},
		{own, "list watch update patch delete", "secrets", "cri-controller-tls", false},
		{everywhere, "list watch update", "secrets", "cri-controller-webhook-tls", false},
		{everywhere, "create update delete deletecollection", "pods", "", false},
		{everywhere, "create get", "pods/exec", "", false},
		{everywhere, "create get", "pods/attach", "", false},
		{everywhere, "create get", "pods/portforward", "", false},
		{everywhere, "create get", "pods/proxy", "", false},
		{everywhere, "get", "pods/log", "", false},
		{everywhere, "create", "pods/eviction", "", false},
		{everywhere, "create", "pods/binding", "", false},
		{everywhere, "update patch", "pods/ephemeralcontainers", "", false},
		{everywhere, "update patch", "pods/resize", "", false},
		{"", "create update patch delete", "nodes", "", false},
		{"", "update", "nodes/status", "", false},
		{"", "get create", "nodes/proxy", "", false},
		{"", "create update patch delete", "namespaces", "", false},
		{everywhere, "create update patch delete list watch", "serviceaccounts", "", false},
		{everywhere, "create", "serviceaccounts/token", "", false},
		{"", "impersonate", "users", "", false},
		{"", "impersonate", "groups", "", false},
		{everywhere, "impersonate", "serviceaccounts", "", false},
		// What the containers of pods are started with.
		{everywhere, "get", "configmaps", "", true},
		{everywhere, "list watch create update patch delete", "configmaps", "", false},
		{everywhere, "get list", "services", "", true},
		{everywhere, "create update patch delete", "services", "", false},
		{everywhere, "get", "persistentvolumeclaims", "", true},
		{everywhere, "list create update patch delete", "persistentvolumeclaims", "", false},
		{"", "get", "persistentvolumes", "", true},
		{"", "list create update patch delete", "persistentvolumes", "", false},
		{everywhere, "create update delete", "deployments.apps", "", false},
		{everywhere, "update patch", "deployments/scale.apps", "", false},
		{everywhere, "create update delete", "statefulsets.apps", "", false},
		{everywhere, "create update delete", "daemonsets.apps", "", false},
		{everywhere, "update delete", "replicasets.apps", "", false},
		{everywhere, "create update patch delete", "controllerrevisions.apps", "", false},
		{everywhere, "create update patch delete", "poddisruptionbudgets.policy", "", false},
		{"", "get create update patch delete bind escalate", "clusterroles.rbac.authorization.k8s.io", "", false},
		{"", "create update patch delete", "clusterrolebindings.rbac.authorization.k8s.io", "", false},
		{everywhere, "create update patch delete bind escalate", "roles.rbac.authorization.k8s.io", "", false},
		{everywhere, "create update patch delete", "rolebindings.rbac.authorization.k8s.io", "", false},
		{"", "create update patch delete", "customresourcedefinitions.apiextensions.k8s.io", "", false},
		{"", "get list watch create update patch delete", "mutatingwebhookconfigurations.admissionregistration.k8s.io",
			"", false},
		{"", "get list watch create update patch delete",
			"validatingwebhookconfigurations.admissionregistration.k8s.io", "", false},
		{"", "create update delete", "validatingwebhookconfigurations.admissionregistration.k8s.io",
			"cri-controller", false},
		{"", "get patch", "validatingwebhookconfigurations.admissionregistration.k8s.io", "another", false},
		// What users need is not the controller's to say, nor to ask.
		{"", "get", "validatingadmissionpolicies.admissionregistration.k8s.io", "inplacerollout.rights.cri-proxy.io",
			true},
		{"", "list watch create update patch delete", "validatingadmissionpolicies.admissionregistration.k8s.io",
			"inplacerollout.rights.cri-proxy.io", false},
		{"", "get", "validatingadmissionpolicies.admissionregistration.k8s.io", "another", false},
		{"", "get", "validatingadmissionpolicybindings.admissionregistration.k8s.io",
			"inplacerollout.rights.cri-proxy.io", true},
		{"", "list watch create update patch delete", "validatingadmissionpolicybindings.admissionregistration.k8s.io",
			"inplacerollout.rights.cri-proxy.io", false},
		{"", "get", "validatingadmissionpolicybindings.admissionregistration.k8s.io", "another", false},
		{"", "create", "subjectaccessreviews.authorization.k8s.io", "", false},
		{"", "list watch update patch delete", "validatingwebhookconfigurations.admissionregistration.k8s.io",
			"kruise-validating-webhook-configuration", false},
		{everywhere, "get create update delete", "leases.coordination.k8s.io", "", false},
		{own, "get update patch delete", "leases.coordination.k8s.io", "another", false},
		{"kube-node-lease", "get update", "leases.coordination.k8s.io", "", false},
		{everywhere, "*", "*.*", "", false},
	} {
		what, group, _ := strings.Cut(tt.what, ".")
		resource, subresource, _ := strings.Cut(what, "/")
		for verb := range strings.FieldsSeq(tt.verbs) {
			review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: "system:serviceaccount:cri-proxy-system:cri-controller",
				Groups: []string{"system:serviceaccounts", "system:serviceaccounts:cri-proxy-system",
					"system:authenticated"},
				ResourceAttributes: &authorizationv1.ResourceAttributes{
					Namespace: tt.namespace, Verb: verb, Group: group, Resource: resource, Subresource: subresource,
					Name: tt.name,
				},
			}}
			must(t, api.Create(t.Context(), review))
			if review.Status.Allowed != tt.allowed {
				t.Errorf("%s %s %s in namespace %q: allowed is %t, want %t (%s)", verb, tt.what, tt.name, tt.namespace,
					review.Status.Allowed, tt.allowed, review.Status.Reason)
			}
		}
	}
}
