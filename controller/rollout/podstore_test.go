// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Pods are kept here and not in the fake client, which takes milliseconds for a write.

var podResource = schema.GroupResource{Resource: "pods"}

// uncached reads past the cache.
type uncached struct {
	client.Reader
	b *bed
}

// Get implements [client.Reader].
func (u uncached) Get(ctx context.Context, key client.ObjectKey, into client.Object, opts ...client.GetOption) error {
	pod, ok := into.(*corev1.Pod)
	if !ok {
		return u.Reader.Get(ctx, key, into, opts...)
	}
	now := u.b.stored(key)
	if now == nil {
		return apierrors.NewNotFound(podResource, key.Name)
	}
	now.DeepCopyInto(pod)
	return nil
}

// stored is a pod as it is, not to be changed; nil without.
func (b *bed) stored(key types.NamespacedName) *corev1.Pod {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.real[key]
}

// store writes a pod if it still is the one of before, which is nil for a new one. A nil pod is
// deleted.
func (b *bed) store(key types.NamespacedName, before, pod *corev1.Pod) error {
	b.mu.Lock()
	if now := b.real[key]; now != before {
		b.mu.Unlock()
		return apierrors.NewConflict(podResource, key.Name, fmt.Errorf("changed meanwhile"))
	}
	if pod == nil {
		delete(b.real, key)
	} else {
		b.version++
		pod.ResourceVersion = strconv.Itoa(b.version)
		b.real[key] = pod
	}
	b.count(before, pod)
	if watch := b.watches[key.Name]; watch != nil && pod != nil {
		watch(before, pod)
	}
	b.mu.Unlock()
	b.moves.Add(1)
	b.podWritten(key, pod)
	return nil
}

// patchPod is what the API server does with a strategic merge patch of a pod, or of its status.
func (b *bed) patchPod(o *corev1.Pod, p client.Patch, status, dry bool) error {
	key := client.ObjectKeyFromObject(o)
	data, err := p.Data(o)
	if err != nil || p.Type() != types.StrategicMergePatchType {
		return fmt.Errorf("patch of type %s: %w", p.Type(), err)
	}
	before := b.stored(key)
	if before == nil {
		return apierrors.NewNotFound(podResource, key.Name)
	}
	var want struct {
		Metadata struct {
			UID             types.UID `json:"uid"`
			ResourceVersion string    `json:"resourceVersion"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(data, &want); err != nil {
		return err
	}
	if v := want.Metadata.ResourceVersion; want.Metadata.UID != before.UID || v != "" && v != before.ResourceVersion {
		return apierrors.NewConflict(podResource, key.Name, fmt.Errorf("it is %s of version %s", before.UID,
			before.ResourceVersion))
	}
	old, err := json.Marshal(before)
	if err != nil {
		return err
	}
	merged, err := strategicpatch.StrategicMergePatch(old, data, corev1.Pod{})
	if err != nil {
		return err
	}
	var after corev1.Pod
	if err := json.Unmarshal(merged, &after); err != nil {
		return err
	}
	if status {
		now := before.DeepCopy()
		now.Status = after.Status
		after = *now
	} else {
		after.Status = *before.Status.DeepCopy()
	}
	if b.policy != nil && !status {
		if err := b.policy(&after, dry); err != nil {
			return err
		}
	}
	if b.statusPolicy != nil && status {
		if err := b.statusPolicy(&after); err != nil {
			return err
		}
	}
	if !dry {
		if err := b.store(key, before, &after); err != nil {
			return err
		}
	}
	after.DeepCopyInto(o)
	return nil
}

// remove deletes a pod.
func (b *bed) remove(name string) {
	key := types.NamespacedName{Namespace: "ns", Name: name}
	for {
		if before := b.stored(key); before == nil || b.store(key, before, nil) == nil {
			return
		}
	}
}

// change changes a pod, or its status, unless change says no.
func (b *bed) change(key types.NamespacedName, uid types.UID, change func(*corev1.Pod) bool) {
	for {
		before := b.stored(key)
		if before == nil || before.UID != uid {
			return
		}
		pod := before.DeepCopy()
		if !change(pod) || b.store(key, before, pod) == nil {
			return
		}
	}
}
