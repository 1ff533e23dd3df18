// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// A job that is OpenKruise's is not touched, and looked at again. Standing down ends what is said to nodes.
func TestGateClosed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Hour)
		b.create("job", spec{})
		b.until("at work", "job", time.Minute, func(j *job) bool { return j.Status.Active == 1 })
		b.kill()
		r := &Reconciler{Client: b.api, APIReader: b.api, Nodes: b.fleet, Log: b.r.Log, Gate: &kruise.Gate{}}
		r.prepare()
		writes := b.writesOf("job")
		for name, inner := range map[string]reconcile.Reconciler{"job": r, "list": &ListReconciler{Client: b.api, Log: r.Log, Gate: r.Gate}} {
			result, err := inner.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
			if err != nil || result.RequeueAfter != kruise.StandBy {
				t.Errorf("%s: %+v, %v", name, result, err)
			}
		}
		if b.writesOf("job") != writes {
			t.Error("the job was written to")
		}
		b.r.standDown()
		if len(b.r.works) != 0 {
			t.Errorf("%d jobs after standing down", len(b.r.works))
		}
	})
}
