// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate_test

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// A controller of another version reads the annotation with what admission has made of images.
func TestState(t *testing.T) {
	state := &evaluate.InPlaceState{
		Rollout: "7a3e7f52-0001", Revision: "6f746289e8", Operation: "op",
		Time: metav1.NewMicroTime(time.Unix(1700000001, 5000).UTC()),
		Containers: map[string]evaluate.Previous{
			"app": {
				Image: "app:1", Base: "app:0", ID: "containerd://1", ImageID: "sha256:1",
				Rewrite: evaluate.Rewrite{Asked: "app:2", Got: "app@sha256:2"},
			},
			"side": {Image: "side:1", Base: "side:1", ID: "containerd://2"},
		},
		There: evaluate.Rewrites{"log": {Asked: "log:1", Got: "log@sha256:3"}},
	}
	text, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"rollout":"7a3e7f52-0001","revision":"6f746289e8","operation":"op","time":"2023-11-14T22:13:21.000005Z",` +
		`"containers":{"app":{"image":"app:1","base":"app:0","id":"containerd://1","imageID":"sha256:1",` +
		`"asked":"app:2","got":"app@sha256:2"},"side":{"image":"side:1","base":"side:1","id":"containerd://2"}},` +
		`"there":{"log":{"asked":"log:1","got":"log@sha256:3"}}}`
	if string(text) != want {
		t.Errorf("annotation\n  %s, want\n  %s", text, want)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{inplace.PodStateAnnotation: want}}}
	read := evaluate.StateOf(pod)
	if read == nil || !read.Time.Equal(&state.Time) {
		t.Fatalf("read %+v", read)
	}
	if read.Time = state.Time; !reflect.DeepEqual(read, state) {
		t.Errorf("read %+v, want %+v", read, state)
	}
}
