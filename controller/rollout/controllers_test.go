// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// controllerPeriod is how often the workloads' own controllers look.
const controllerPeriod = 500 * time.Millisecond

// hashLabel is what a ReplicaSet tells its pods by.
const hashLabel = appsv1.DefaultDeploymentUniqueLabelKey

func templateOf(image string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: image,
			Env: []corev1.EnvVar{{Name: "A", Value: "b"}}}, {Name: "side", Image: "side:1"}}},
	}
}

var webSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}

func replicas(n int) *int32 {
	v := int32(n)
	return &v
}

// addStatefulSet makes a StatefulSet with its pods and runs its controller.
func (b *bed) addStatefulSet(n int, change ...func(*appsv1.StatefulSet)) {
	s := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-sts", Generation: 1},
		Spec: appsv1.StatefulSetSpec{
			Replicas: replicas(n), Selector: webSelector, Template: templateOf("app:1"),
			UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType},
		},
	}
	for _, f := range change {
		f(s)
	}
	b.addWorkload(s, func() { b.syncStatefulSet() })
}

func (b *bed) addDaemonSet(change ...func(*appsv1.DaemonSet)) {
	d := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-ds", Generation: 1},
		Spec: appsv1.DaemonSetSpec{
			Selector: webSelector, Template: templateOf("app:1"),
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType},
		},
	}
	for _, f := range change {
		f(d)
	}
	b.addWorkload(d, func() { b.syncDaemonSet() })
}

func (b *bed) addDeployment(n int) {
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-deploy", Generation: 1},
		Spec:       appsv1.DeploymentSpec{Replicas: replicas(n), Selector: webSelector, Template: templateOf("app:1")},
	}
	b.addWorkload(d, func() { b.syncDeployment() })
}

func (b *bed) addWorkload(o client.Object, sync func()) {
	b.t.Helper()
	if err := b.api.Create(context.Background(), o); err != nil {
		b.t.Fatal(err)
	}
	b.wg.Go(func() {
		seen := int64(-1)
		for ok := true; ok; ok = retry.Sleep(b.ctx, controllerPeriod) {
			if now := b.moves.Load(); now != seen { // else there is nothing to do: hours would take long
				sync()
				seen = now
			}
		}
	})
	for range 100 {
		time.Sleep(controllerPeriod)
		if pods := b.pods(); len(pods) > 0 && b.unready() == 0 {
			break
		}
	}
	time.Sleep(controllerPeriod)
	b.mu.Lock()
	b.peak = 0
	b.mu.Unlock()
}

// generation is what the API server does to a workload whose spec has changed.
func (b *bed) generation(ctx context.Context, o client.Object, change func() error) error {
	specOf := func(o client.Object) any {
		switch o := o.(type) {
		case *appsv1.StatefulSet:
			return o.Spec.DeepCopy()
		case *appsv1.DaemonSet:
			return o.Spec.DeepCopy()
		case *appsv1.Deployment:
			return o.Spec.DeepCopy()
		case *appsv1.ReplicaSet:
			return o.Spec.DeepCopy()
		}
		return nil
	}
	if specOf(o) == nil {
		return change()
	}
	before := o.DeepCopyObject().(client.Object)
	if err := b.api.Get(ctx, client.ObjectKeyFromObject(o), before); err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	if apiequality.Semantic.DeepEqual(specOf(before), specOf(o)) {
		return nil
	}
	o.SetGeneration(before.GetGeneration() + 1)
	return b.api.Update(ctx, o)
}

// user changes a workload as people do.
func user[T client.Object](b *bed, o T, change func(T)) {
	b.t.Helper()
	o.SetNamespace("ns")
	o.SetName("web")
	for {
		if err := b.api.Get(context.Background(), client.ObjectKeyFromObject(o), o); err != nil {
			b.t.Fatal(err)
		}
		change(o)
		o.SetGeneration(o.GetGeneration() + 1)
		if err := b.api.Update(context.Background(), o); err == nil {
			b.changed(o)
			return
		} else if !apierrors.IsConflict(err) {
			b.t.Fatal(err)
		}
	}
}

func read[T client.Object](b *bed, o T) T {
	if err := b.api.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: "web"}, o); err != nil {
		b.t.Error(err)
	}
	return o
}

// revise is the revision of a template, made if there is none; equal templates have one.
func (b *bed) revise(owner client.Object, kind string, t *corev1.PodTemplateSpec) string {
	ctx := context.Background()
	data, err := json.Marshal(map[string]any{"spec": map[string]any{"template": t}})
	if err != nil {
		b.t.Error(err)
	}
	label := objects.Hash(string(data))
	name := owner.GetName() + "-" + label
	var list appsv1.ControllerRevisionList
	if err := b.api.List(ctx, &list, client.InNamespace("ns")); err != nil {
		b.t.Error(err)
	}
	newest := int64(0)
	var mine *appsv1.ControllerRevision
	for i := range list.Items {
		newest = max(newest, list.Items[i].Revision)
		if list.Items[i].Name == name {
			mine = &list.Items[i]
		}
	}
	switch {
	case mine == nil:
		yes := true
		err = b.api.Create(ctx, &appsv1.ControllerRevision{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name,
				Labels:          map[string]string{"app": "web", podtemplate.RevisionLabel: label},
				OwnerReferences: []metav1.OwnerReference{{Kind: kind, UID: owner.GetUID(), Controller: &yes}}},
			Data: runtime.RawExtension{Raw: data}, Revision: newest + 1,
		})
	case mine.Revision < newest:
		mine.Revision = newest + 1
		err = b.api.Update(ctx, mine)
	}
	if err != nil {
		b.t.Error(err)
	}
	if kind == workload.KindStatefulSet {
		return name
	}
	return label
}

// make is a pod of a workload; it is not started yet.
func (b *bed) make(name, node, kind string, owner client.Object, t *corev1.PodTemplateSpec, labels map[string]string) {
	yes := true
	b.addPod(name, node, func(p *corev1.Pod) {
		p.Spec.Containers = t.DeepCopy().Spec.Containers
		p.Spec.ReadinessGates = t.Spec.ReadinessGates
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: owner.GetName(),
			UID: owner.GetUID(), Controller: &yes}}
		for k, v := range labels {
			p.Labels[k] = v
		}
		p.Status = corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{}}
	})
}

func (b *bed) saveStatus(o client.Object) {
	if err := b.api.Status().Update(context.Background(), o); err == nil {
		b.changed(o)
	} else if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		b.t.Error(err)
	}
}

func (b *bed) syncStatefulSet() {
	s := read(b, &appsv1.StatefulSet{})
	revision := b.revise(s, workload.KindStatefulSet, &s.Spec.Template)
	if s.Status.ObservedGeneration != s.Generation || s.Status.UpdateRevision != revision {
		s.Status.ObservedGeneration, s.Status.UpdateRevision = s.Generation, revision
		b.saveStatus(s)
	}
	for i := range int(*s.Spec.Replicas) {
		if name := fmt.Sprintf("web-%d", i); b.pod(name) == nil {
			b.make(name, fmt.Sprintf("node-%d", i%3), workload.KindStatefulSet, s, &s.Spec.Template,
				map[string]string{podtemplate.RevisionLabel: revision})
		}
	}
	for _, pod := range b.pods() {
		if ordinalOf(pod.Name) >= int(*s.Spec.Replicas) {
			b.remove(pod.Name)
		}
	}
}

func (b *bed) syncDaemonSet() {
	d := read(b, &appsv1.DaemonSet{})
	revision := b.revise(d, workload.KindDaemonSet, &d.Spec.Template)
	b.mu.Lock()
	names := slices.Sorted(maps.Keys(b.nodes))
	b.mu.Unlock()
	if d.Status.ObservedGeneration != d.Generation || int(d.Status.DesiredNumberScheduled) != len(names) {
		d.Status.ObservedGeneration, d.Status.DesiredNumberScheduled = d.Generation, int32(len(names))
		b.saveStatus(d)
	}
	there := map[string]bool{}
	for _, pod := range b.pods() {
		there[pod.Spec.NodeName] = true
	}
	for _, node := range names {
		if !there[node] {
			b.make("web-of-"+node, node, workload.KindDaemonSet, d, &d.Spec.Template,
				map[string]string{podtemplate.RevisionLabel: revision})
		}
	}
}

// syncDeployment is both the Deployment's and the ReplicaSets' controller.
func (b *bed) syncDeployment() {
	ctx := context.Background()
	d := read(b, &appsv1.Deployment{})
	var sets appsv1.ReplicaSetList
	if err := b.api.List(ctx, &sets, client.InNamespace("ns")); err != nil {
		b.t.Error(err)
	}
	var mine *appsv1.ReplicaSet
	newest := 0
	for i := range sets.Items {
		s := &sets.Items[i]
		if podtemplate.SameTemplate(&s.Spec.Template, &d.Spec.Template) && (mine == nil || older(s, mine)) {
			mine = s
		}
	}
	for i := range sets.Items {
		if s := &sets.Items[i]; mine == nil || s.Name != mine.Name {
			newest = max(newest, numberOf(s))
		}
	}
	if mine != nil && numberOf(mine) <= newest {
		mine.Annotations[revisionNote] = strconv.Itoa(newest + 1)
		for key, value := range d.Annotations { // as the real one does
			mine.Annotations[key] = value
		}
		if err := b.api.Update(ctx, mine); err == nil {
			b.changed(mine)
		} else if !apierrors.IsConflict(err) {
			b.t.Error(err)
		}
	}
	if mine == nil && !d.Spec.Paused {
		yes := true
		label := objects.Hash(d.Spec.Template, newest)
		t := d.Spec.Template.DeepCopy()
		t.Labels[hashLabel] = label
		mine = &appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "ns", Name: "web-" + label, UID: types.UID("uid-" + label), Generation: 1,
				CreationTimestamp: metav1.Now(), Labels: map[string]string{"app": "web"},
				Annotations: map[string]string{revisionNote: strconv.Itoa(newest + 1)},
				OwnerReferences: []metav1.OwnerReference{{Kind: workload.KindDeployment, Name: "web", UID: d.UID,
					Controller: &yes}},
			},
			Spec: appsv1.ReplicaSetSpec{Replicas: d.Spec.Replicas, Selector: webSelector, Template: *t},
		}
		if err := b.api.Create(ctx, mine); err != nil {
			b.t.Error(err)
		}
		sets.Items = append(sets.Items, *mine)
	}
	if d.Status.ObservedGeneration != d.Generation {
		d.Status.ObservedGeneration = d.Generation
		b.saveStatus(d)
	}
	for i := range sets.Items {
		s := &sets.Items[i]
		want := *s.Spec.Replicas
		if mine != nil && !d.Spec.Paused {
			want = 0
			if s.Name == mine.Name {
				want = *d.Spec.Replicas
			}
		} else if want > 0 {
			want = *d.Spec.Replicas // a paused one is scaled too
		}
		if *s.Spec.Replicas != want {
			*s.Spec.Replicas, s.Generation = want, s.Generation+1
			if err := b.api.Update(ctx, s); err != nil && !apierrors.IsConflict(err) {
				b.t.Error(err)
			}
		}
		b.syncReplicaSet(s)
	}
}

func (b *bed) syncReplicaSet(s *appsv1.ReplicaSet) {
	var pods []*corev1.Pod
	for _, pod := range b.pods() {
		if c := metav1.GetControllerOf(pod); c != nil && c.UID == s.UID {
			pods = append(pods, pod)
		}
	}
	for n := len(pods); n < int(*s.Spec.Replicas); n++ {
		b.mu.Lock()
		b.serial++
		name := fmt.Sprintf("%s-%03d", s.Name, b.serial)
		b.mu.Unlock()
		b.make(name, fmt.Sprintf("node-%d", n%3), "ReplicaSet", s, &s.Spec.Template,
			map[string]string{hashLabel: s.Spec.Template.Labels[hashLabel]})
	}
	for n := len(pods); n > int(*s.Spec.Replicas); n-- {
		b.remove(pods[n-1].Name)
	}
	if s.Status.ObservedGeneration != s.Generation || s.Status.Replicas != *s.Spec.Replicas {
		s.Status.ObservedGeneration, s.Status.Replicas = s.Generation, *s.Spec.Replicas
		b.saveStatus(s)
	}
}

// revisionNote is the annotation by which the Deployment's controller numbers ReplicaSets.
const revisionNote = "deployment.kubernetes.io/revision"

// numberOf is the revision of a ReplicaSet; -1 without.
func numberOf(set *appsv1.ReplicaSet) int {
	n, err := strconv.Atoi(set.Annotations[revisionNote])
	if err != nil {
		return -1
	}
	return n
}

// replicasOf is how many pods a ReplicaSet is to have.
func replicasOf(set *appsv1.ReplicaSet) int32 {
	if set.Spec.Replicas == nil {
		return 1
	}
	return *set.Spec.Replicas
}

// older says that the Deployment's controller takes the first of two ReplicaSets for the older one.
func older(a, b *appsv1.ReplicaSet) bool {
	if a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.Name < b.Name
	}
	return a.CreationTimestamp.Before(&b.CreationTimestamp)
}
