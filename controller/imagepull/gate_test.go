// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	joblist "github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
)

// The reconciler does not touch a job that is OpenKruise's, and looks at it again. Closing the gate
// ends the calls to nodes.
func TestGateClosed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.addMany(2, time.Hour)
		b.create("job", spec{})
		b.until("at work", "job", time.Minute, func(j *job) bool { return j.Status.Active == 1 })
		b.kill()
		r := &imagepull.Reconciler{Client: b.api, APIReader: b.api, Nodes: b.fleet, Log: b.r.Log, Gate: &kruise.Gate{}}
		r.Prepare()
		writes := b.writesOf("job")
		for name, inner := range map[string]reconcile.Reconciler{"job": r,
			"list": &joblist.Reconciler{Client: b.api, Log: r.Log, Gate: r.Gate}} {
			result, err := inner.Reconcile(t.Context(),
				reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
			if err != nil || result.RequeueAfter != kruise.StandBy {
				t.Errorf("%s: %+v, %v", name, result, err)
			}
		}
		if b.writesOf("job") != writes {
			t.Error("the job was written to")
		}
		b.r.ForgetAll()
		if b.r.Known() != 0 {
			t.Errorf("%d jobs after standing down", b.r.Known())
		}
	})
}
