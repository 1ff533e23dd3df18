// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package workload_test

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// Of the managed fields the controller's own are taken out, and nothing else.
func TestDisown(t *testing.T) {
	entry := func(manager string, operation metav1.ManagedFieldsOperationType, sub string) metav1.ManagedFieldsEntry {
		return metav1.ManagedFieldsEntry{Manager: manager, Operation: operation, Subresource: sub}
	}
	own := entry(workload.FieldOwner, metav1.ManagedFieldsOperationUpdate, "")
	git := entry("argocd-controller", metav1.ManagedFieldsOperationApply, "")
	for _, tt := range []struct {
		name   string
		fields []metav1.ManagedFieldsEntry
		want   string
	}{
		{"none", nil, ""},
		{"of others", []metav1.ManagedFieldsEntry{git, entry(workload.FieldOwner, metav1.ManagedFieldsOperationUpdate,
			"status"), entry(workload.FieldOwner, metav1.ManagedFieldsOperationApply, "")}, ""},
		{"ours too", []metav1.ManagedFieldsEntry{git, own},
			`[{"op":"replace","path":"/metadata/managedFields","value":[{"manager":"argocd-controller","operation":"Apply"}]},{"op":"replace","path":"/metadata/resourceVersion","value":"7"}]`},
		{"ours alone", []metav1.ManagedFieldsEntry{own},
			`[{"op":"replace","path":"/metadata/managedFields","value":[{}]},{"op":"replace","path":"/metadata/resourceVersion","value":"7"}]`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := workload.Disown(&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "7",
				ManagedFields: tt.fields}})
			if err != nil || strings.TrimSpace(string(got)) != tt.want {
				t.Errorf("patch %s, error %v", got, err)
			}
		})
	}
}
