// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package gates

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/event"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

func TestEndings(t *testing.T) {
	with := &inplace.InPlaceRollout{ObjectMeta: metav1.ObjectMeta{Finalizers: []string{inplace.RolloutFinalizer}}}
	if p := endings(); !p.Update(event.UpdateEvent{ObjectOld: with, ObjectNew: &inplace.InPlaceRollout{}}) || p.Update(event.UpdateEvent{ObjectOld: with, ObjectNew: with}) || !p.Delete(event.DeleteEvent{Object: with}) {
		t.Error("the end of a rollout is not seen, or seen where there is none")
	}
}
