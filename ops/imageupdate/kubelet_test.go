// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import "testing"

// The last answer of an operation gets to kubelet, however fast the operation ends after it.
func TestLastStopIsAnswered(t *testing.T) {
	for range 50 {
		k := newKubelet(nil)
		k.listen(true)
		done := make(chan struct{})
		go func() {
			defer close(done)
			q := <-k.stops
			q.answer <- true
			close(k.over)
		}()
		if ok, err := k.Stop(t.Context(), 30); !ok || err != nil {
			t.Fatalf("got %v, %v", ok, err)
		}
		<-done
	}
}
