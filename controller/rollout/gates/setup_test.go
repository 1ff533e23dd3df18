// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gates_test

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
)

func TestEndings(t *testing.T) {
	with := &inplace.InPlaceRollout{ObjectMeta: metav1.ObjectMeta{Finalizers: []string{inplace.RolloutFinalizer}}}
	if p := gates.Endings(); !p.Update(event.UpdateEvent{ObjectOld: with, ObjectNew: &inplace.InPlaceRollout{}}) ||
		p.Update(event.UpdateEvent{ObjectOld: with, ObjectNew: with}) || !p.Delete(event.DeleteEvent{Object: with}) {
		t.Error("the end of a rollout is not seen, or seen where there is none")
	}
}
