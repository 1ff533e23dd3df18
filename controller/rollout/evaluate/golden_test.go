// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate_test

import (
	"encoding/json"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// A controller of another version finds operations, annotations and pins under these names. They
// must not change.
func TestGolden(t *testing.T) {
	r := &inplace.InPlaceRollout{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-web",
			Annotations: map[string]string{inplace.RetryAnnotation: "2"}},
		Spec: inplace.InPlaceRolloutSpec{Containers: []inplace.ContainerChange{{Name: "side"},
			{Name: "app", Image: "nginx:2"}}},
	}
	restarted := r.DeepCopy()
	restarted.Annotations[evaluate.RestartedAt] = "2026-01-02T03:04:05Z"
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web-0", UID: "uid-pod"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "nginx:1"}}},
	}
	g := evaluate.GoalOf(r)
	ids := map[string]string{"app": "containerd://1", "side": "containerd://2"}
	long := g
	long.Rollout = "a-uid-that-is-so-long-that-what-begins-with-it-would-be-longer-than-" +
		"what-nodes-take-for-the-uid-of-an-operation"
	m := &evaluate.InPlaceState{
		Rollout: r.UID, Revision: g.Revision, Operation: "op",
		Time: metav1.NewMicroTime(time.Unix(1700000000, 5000).UTC()),
		Containers: map[string]evaluate.Previous{"app": {Image: "nginx:1", Base: "nginx:0", ID: "containerd://1",
			ImageID: "sha256:1"}},
	}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, got, want string }{
		{"revision", g.Revision, "e1c6230ac1"},
		{"revision of a restart", evaluate.RevisionOf(restarted), "b3083860fd"},
		{"upgrade", evaluate.OperationUID("u", g, pod, ids, 0), "uid-web.u.uid-pod.6315476e92"},
		{"upgrade, another round", evaluate.OperationUID("u", g, pod, ids, 3), "uid-web.u.uid-pod.9080534a80"},
		{"long UID", evaluate.OperationUID("u", long, pod, ids, 0), "u.7feb71744b.7dd6624d78"},
		{"restart", m.RestartUID(pod), "uid-web.r.uid-pod.64dd6e2b52"},
		{"owner", evaluate.OwnerOf(r), "InPlaceRollout/ns/web/uid-web"},
		{"images", objects.Hash(g.Images), "7d265f51d6"},
		{"mark", string(text),
			`{"rollout":"uid-web","revision":"e1c6230ac1","operation":"op","time":"2023-11-14T22:13:20.000005Z",` +
				`"containers":{"app":{"image":"nginx:1","base":"nginx:0","id":"containerd://1","imageID":"sha256:1"}}}`},
	} {
		if tt.got != tt.want {
			t.Errorf("%s is\n  %s, want\n  %s", tt.name, tt.got, tt.want)
		}
	}
}
