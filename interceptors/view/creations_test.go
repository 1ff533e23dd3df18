// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view_test

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// The last answer of an operation gets to kubelet, however fast the operation ends after it.
func TestLastCreationIsAnswered(t *testing.T) {
	for range 50 {
		creations, over, done := make(view.Creations), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			(<-creations).Adopt("new")
			close(over)
		}()
		if id, ok := creations.Ask(t.Context(), &runtimeapi.CreateContainerRequest{}, over); id != "new" || !ok {
			t.Fatalf("got %q, %v", id, ok)
		}
		<-done
	}
}
