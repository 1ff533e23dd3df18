// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/crew"
)

// podNameIndex finds the unfinished requests of a pod.
const podNameIndex = "spec.podName"

// NewScheme has the types the controllers read and write.
func NewScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(s); err != nil {
		return nil, err
	}
	if err := appsv1alpha1.AddToScheme(s); err != nil {
		return nil, err
	}
	if err := v1beta1.AddToScheme(s); err != nil {
		return nil, err
	}
	return s, inplace.AddToScheme(s)
}

// CacheOptions keep of pods and nodes only what the controllers read: the cache of
// a large cluster is otherwise mostly env, volumes and managed fields.
func CacheOptions() cache.Options {
	return cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:  {Transform: slimPod},
			&corev1.Node{}: {Transform: slimNode},
		},
	}
}

// slimPod is a cache transform; what is no pod stays as it is.
func slimPod(in any) (any, error) {
	pod, ok := in.(*corev1.Pod)
	if !ok {
		return in, nil
	}
	slim := &corev1.Pod{
		ObjectMeta: slimMeta(&pod.ObjectMeta, mirrorAnnotation, inplace.PodStateAnnotation, NudgeAnnotation),
	}
	slim.Labels, slim.OwnerReferences, slim.CreationTimestamp = pod.Labels, pod.OwnerReferences, pod.CreationTimestamp
	slim.Spec.ServiceAccountName, slim.Spec.ImagePullSecrets = pod.Spec.ServiceAccountName, pod.Spec.ImagePullSecrets
	if s := pod.Spec.SecurityContext; s != nil {
		slim.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: s.RunAsNonRoot, RunAsUser: s.RunAsUser}
	}
	slim.Spec.TerminationGracePeriodSeconds = pod.Spec.TerminationGracePeriodSeconds
	slim.Spec.NodeName, slim.Spec.RestartPolicy, slim.Spec.ReadinessGates = pod.Spec.NodeName, pod.Spec.RestartPolicy, pod.Spec.ReadinessGates
	containers := func(list []corev1.Container) []corev1.Container {
		var slim []corev1.Container
		for _, c := range list {
			kept := corev1.Container{
				Name: c.Name, Image: c.Image, ImagePullPolicy: c.ImagePullPolicy, Ports: c.Ports, Lifecycle: c.Lifecycle, RestartPolicy: c.RestartPolicy, RestartPolicyRules: c.RestartPolicyRules,
				StartupProbe: slimProbe(c.StartupProbe), ReadinessProbe: slimProbe(c.ReadinessProbe),
			}
			if s := c.SecurityContext; s != nil {
				kept.SecurityContext = &corev1.SecurityContext{RunAsNonRoot: s.RunAsNonRoot, RunAsUser: s.RunAsUser}
			}
			slim = append(slim, kept)
		}
		return slim
	}
	slim.Spec.Containers, slim.Spec.InitContainers = containers(pod.Spec.Containers), containers(pod.Spec.InitContainers)
	for _, c := range pod.Spec.EphemeralContainers {
		slim.Spec.EphemeralContainers = append(slim.Spec.EphemeralContainers,
			corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: c.Name}})
	}
	statuses := func(list []corev1.ContainerStatus) []corev1.ContainerStatus {
		var slim []corev1.ContainerStatus
		for _, c := range list {
			slim = append(slim, corev1.ContainerStatus{
				Name: c.Name, State: c.State, Ready: c.Ready, Started: c.Started, RestartCount: c.RestartCount, ContainerID: c.ContainerID,
				Image: c.Image, ImageID: c.ImageID, LastTerminationState: c.LastTerminationState,
			})
		}
		return slim
	}
	slim.Status.Phase, slim.Status.Conditions, slim.Status.PodIP = pod.Status.Phase, pod.Status.Conditions, pod.Status.PodIP
	slim.Status.ContainerStatuses, slim.Status.InitContainerStatuses = statuses(pod.Status.ContainerStatuses), statuses(pod.Status.InitContainerStatuses)
	return slim, nil
}

// slimProbe keeps that there is one, and when it is due.
func slimProbe(p *corev1.Probe) *corev1.Probe {
	if p == nil {
		return nil
	}
	return &corev1.Probe{PeriodSeconds: p.PeriodSeconds, InitialDelaySeconds: p.InitialDelaySeconds}
}

// slimNode is a cache transform; what is no node stays as it is.
func slimNode(in any) (any, error) {
	node, ok := in.(*corev1.Node)
	if !ok {
		return in, nil
	}
	slim := &corev1.Node{ObjectMeta: slimMeta(&node.ObjectMeta, OpsAddressAnnotation)}
	slim.Labels = node.Labels
	slim.Status.Addresses, slim.Status.NodeInfo.KubeletVersion = node.Status.Addresses, node.Status.NodeInfo.KubeletVersion
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady || c.Type == BypassedCondition {
			// Without the times: a heartbeat is no change.
			slim.Status.Conditions = append(slim.Status.Conditions, corev1.NodeCondition{Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message})
		}
	}
	return slim, nil
}

func slimMeta(m *metav1.ObjectMeta, annotations ...string) metav1.ObjectMeta {
	slim := metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, DeletionTimestamp: m.DeletionTimestamp,
	}
	for _, key := range annotations {
		if value, ok := m.Annotations[key]; ok {
			if slim.Annotations == nil {
				slim.Annotations = map[string]string{}
			}
			slim.Annotations[key] = value
		}
	}
	return slim
}

// SetupWithManager adds the reconciler to a manager: it then watches requests,
// pods and running operations with the given number of workers, which does not
// count reconciles that wait for a node.
func (r *ContainerRecreateReconciler) SetupWithManager(ctx context.Context, m manager.Manager, workers int) error {
	r.watches = newOperationWatches(r.Nodes, r.Metrics, r.Log, maxWatches)
	r.Nodes = newUnhurried(r.Nodes)
	hands := crew.New(nil)
	if err := m.Add(hands); err != nil {
		return err
	}
	newRequest := func() client.Object { return &appsv1alpha1.ContainerRecreateRequest{} }
	spread := crew.NewSpread(TellAPIErrors(r, newRequest, m.GetClient(), r.Recorder), hands, workers)
	r.Gate.OnClose(r.standDown)
	if err := m.Add(r.watches); err != nil {
		return err
	}
	if err := m.GetFieldIndexer().IndexField(ctx, &appsv1alpha1.ContainerRecreateRequest{}, podNameIndex, indexPodName); err != nil {
		return err
	}
	return builder.ControllerManagedBy(m).
		Named("containerrecreaterequest").
		For(&appsv1alpha1.ContainerRecreateRequest{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(r.requestsOfPod), builder.WithPredicates(podChanges())).
		WatchesRawSource(spread).
		WatchesRawSource(source.Channel(r.watches.events, &handler.TypedEnqueueRequestForObject[*appsv1alpha1.ContainerRecreateRequest]{})).
		WithOptions(controller.Options{
			MaxConcurrentReconciles: workers,
			RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second),
		}).
		Complete(spread)
}

// indexPodName leaves completed requests out: their pod does not matter any more.
func indexPodName(o client.Object) []string {
	crr, ok := o.(*appsv1alpha1.ContainerRecreateRequest)
	if !ok || crr.Status.CompletionTime != nil {
		return nil
	}
	return []string{crr.Spec.PodName}
}

// requestsOfPod are the unfinished requests for a pod.
func (r *ContainerRecreateReconciler) requestsOfPod(ctx context.Context, pod client.Object) []reconcile.Request {
	var list appsv1alpha1.ContainerRecreateRequestList
	if err := r.Client.List(ctx, &list, client.InNamespace(pod.GetNamespace()), client.MatchingFields{podNameIndex: pod.GetName()}); err != nil {
		r.Log.WithError(err).WithField("pod", client.ObjectKeyFromObject(pod).String()).Warn("listing the requests of a pod")
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: list.Items[i].Namespace, Name: list.Items[i].Name}})
	}
	return requests
}

// podChanges lets through what can take a request further: a container changed, or
// the pod is going.
func podChanges() predicate.Predicate {
	return predicate.Funcs{
		CreateFunc:  func(event.CreateEvent) bool { return false },
		GenericFunc: func(event.GenericEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok1 := e.ObjectOld.(*corev1.Pod)
			after, ok2 := e.ObjectNew.(*corev1.Pod)
			return !ok1 || !ok2 || before.UID != after.UID || before.Status.Phase != after.Status.Phase ||
				(before.DeletionTimestamp == nil) != (after.DeletionTimestamp == nil) ||
				!slices.EqualFunc(before.Status.ContainerStatuses, after.Status.ContainerStatuses, sameStatus) ||
				!slices.EqualFunc(before.Status.InitContainerStatuses, after.Status.InitContainerStatuses, sameStatus)
		},
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// sameStatus compares what observe reads.
func sameStatus(a, b corev1.ContainerStatus) bool {
	return a.Name == b.Name && a.ContainerID == b.ContainerID && a.Ready == b.Ready && isTrue(a.Started) == isTrue(b.Started) && a.RestartCount == b.RestartCount &&
		(a.State.Running == nil) == (b.State.Running == nil) && (a.State.Terminated == nil) == (b.State.Terminated == nil) &&
		(a.State.Waiting == nil) == (b.State.Waiting == nil)
}
