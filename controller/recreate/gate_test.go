// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"testing"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// A request that is OpenKruise's is not touched, and looked at again; what is known of others is
// forgotten.
func TestGateClosed(t *testing.T) {
	b := newBed(t)
	b.r.Gate = &kruise.Gate{}
	b.create("a", spec{Containers: containers("app")})
	result, err := b.r.Reconcile(t.Context(),
		reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "a"}})
	if err != nil || result.RequeueAfter != kruise.StandBy {
		t.Errorf("%+v, %v", result, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n, _, _ := b.r.Kept(); len(b.writes) != 0 || n != 0 {
		t.Errorf("writes %v, %d memories", b.writes, n)
	}
	b.r.Remember(&request{})
	b.r.StandDown()
	if n, _, _ := b.r.Kept(); n != 0 {
		t.Errorf("%d memories after standing down", n)
	}
}
