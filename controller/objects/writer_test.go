// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package objects_test

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// What the cache has is stale only if it is older for certain.
func TestFreshness(t *testing.T) {
	for _, tt := range []struct {
		written, cached string
		want            bool
	}{
		{"10", "9", true}, {"10", "10", false}, {"9", "10", false}, {"", "1", false}, {"10", "", false},
		{"10", "x", false},
	} {
		var f objects.Freshness
		f.Wrote(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{ResourceVersion: tt.written}})
		if got := f.Stale(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{ResourceVersion: tt.cached}}); got != tt.want {
			t.Errorf("%q in the cache, %q written: %v", tt.cached, tt.written, got)
		}
	}
	if (&objects.Freshness{}).Stale(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "1"}}) {
		t.Error("stale before the first write")
	}
}

// Only changes are written, and only on top of what they were made from.
func TestWriter(t *testing.T) {
	ctx := t.Context()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod"}}
	server := fake.NewClientBuilder().WithObjects(pod).WithStatusSubresource(pod).Build()
	if err := server.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil {
		t.Fatal(err)
	}
	var fresh objects.Freshness
	var told []string
	w := &objects.Writer[*corev1.Pod]{Client: server, Kind: "pod", Wrote: func(what string, o *corev1.Pod) {
		told = append(told, what)
		fresh.Wrote(o)
	}}
	old := pod.DeepCopy()
	if err := w.Patch(ctx, pod, old); err != nil {
		t.Fatal(err)
	}
	pod.Labels = map[string]string{"a": "b"}
	if err := w.Patch(ctx, pod, old); err != nil {
		t.Fatal(err)
	}
	labelled := pod.DeepCopy()
	if wrote, err := w.PatchStatus(ctx, pod, labelled); wrote || err != nil {
		t.Errorf("%v, %v without a change", wrote, err)
	}
	pod.Status.Phase = corev1.PodRunning
	if wrote, err := w.PatchStatus(ctx, pod, labelled); !wrote || err != nil {
		t.Errorf("%v, %v with a change", wrote, err)
	}
	if want := []string{"pod", "pod status"}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
	if !fresh.Stale(labelled) || fresh.Stale(pod) {
		t.Error("the version written last is not kept")
	}
	pod = old.DeepCopy()
	pod.Labels = map[string]string{"a": "c"}
	if err := w.Patch(ctx, pod, old); !apierrors.IsConflict(err) {
		t.Errorf("%v on top of an old version", err)
	}
	pod = old.DeepCopy()
	pod.Status.Phase = corev1.PodFailed
	if wrote, err := w.PatchStatus(ctx, pod, old); wrote || !apierrors.IsConflict(err) {
		t.Errorf("%v, %v on top of an old version", wrote, err)
	}
}
