// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package jobbudget counts the restarts that the backoffLimit of a Job still has room for.
//
// A restart on command raises the container's restart count, as each restart does, and the Job
// controller cannot know that nothing has failed. For pods with restartPolicy OnFailure it adds up
// the restart counts of all containers of the Job's pods. When the sum reaches backoffLimit it
// fails the Job and deletes its pods (pkg/controller/job job_controller.go
// pastBackoffLimitOnFailure; with a limit of 0 the first restart is too many).
//
// Everything else that can end a Job looks at pods in phase Failed: podFailurePolicy,
// backoffLimitPerIndex, and backoffLimit with restartPolicy Never (getFailJobMessage, isPodFailed).
// A container that is replaced does not fail its pod: kubelet finds the successor running. The exit
// codes of restartPolicyRules, RestartAllContainers among them, do not count either: kubelet looks
// at the newest container of a name (pkg/kubelet/container helpers.go ShouldAllContainersRestart),
// and never sees the old container end without the new one.
package jobbudget

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// +kubebuilder:rbac:groups=batch,resources=jobs,verbs=get
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch

// IgnoreAnnotation lets a restart end the Job of the pod when it is "true" on the
// ContainerRecreateRequest or InPlaceRollout.
const IgnoreAnnotation = "cri-proxy.io/ignore-backoff-limit"

// takenFor is how long a restart counts that was allowed and that no pod shows yet: the longest
// that a restart may take.
const takenFor = time.Hour

// Budgets says which restarts the backoffLimit of a Job still has room for. It counts the restarts
// that it allowed and that no pod shows yet. All reconcilers that restart containers share one. The
// zero value is ready for use; a nil *Budgets counts only what pods show.
type Budgets struct {
	mu    sync.Mutex
	taken map[string]restarts
}

// restarts are the restarts of one operation that Take allowed.
type restarts struct {
	job, pod   types.UID
	containers map[string]string // name → ID of the container to replace
	at         time.Time
}

// Take says why the containers of a pod, by name and ID, must not be restarted. It returns "" if
// they may be, and counts them under the name of the operation. live reads past the cache.
func (b *Budgets) Take(
	ctx context.Context, live client.Reader, pod *corev1.Pod, operation string, containers map[string]string,
) (string, error) {
	job, err := jobOf(ctx, live, pod)
	if job == nil || err != nil {
		return "", err
	}
	if b == nil {
		b = &Budgets{}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	list, err := podsOf(ctx, live, job)
	if err != nil {
		return "", err
	}
	delete(b.taken, operation)
	coming := 0
	for uid, t := range b.taken {
		if t.job != job.UID {
			continue
		}
		if left := t.left(list); left == 0 {
			delete(b.taken, uid)
		} else {
			coming += left
		}
	}
	mine := restarts{job.UID, pod.UID, maps.Clone(containers), time.Now()}
	if why := endsJob(job, list, coming, mine.left(list), slices.Sorted(maps.Keys(containers))); why != "" {
		return why, nil
	}
	if b.taken == nil {
		b.taken = map[string]restarts{}
	}
	b.taken[operation] = mine
	return "", nil
}

// Return takes the restarts of an operation that has ended off the count.
func (b *Budgets) Return(operation string) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.taken, operation)
}

// left returns how many of the restarts the pods of the Job do not show.
func (t *restarts) left(list []*corev1.Pod) int {
	if time.Since(t.at) >= takenFor {
		return 0
	}
	i := slices.IndexFunc(list, func(p *corev1.Pod) bool { return p.UID == t.pod })
	if i < 0 {
		return 0 // a pod that has ended does not count
	}
	n := 0
	for name, id := range t.containers {
		if s := pods.Status(list[i], name); s != nil && s.ContainerID == id {
			n++
		}
	}
	return n
}

// WouldEnd says why containers of a pod must not be restarted, or returns "". It counts nothing.
func WouldEnd(ctx context.Context, live client.Reader, pod *corev1.Pod, containers []string) (string, error) {
	job, err := jobOf(ctx, live, pod)
	if job == nil || err != nil {
		return "", err
	}
	list, err := podsOf(ctx, live, job)
	if err != nil {
		return "", err
	}
	return endsJob(job, list, 0, len(containers), containers), nil
}

// endsJob compares as pastBackoffLimitOnFailure does, with the restarts to come added.
func endsJob(job *batchv1.Job, list []*corev1.Pod, coming, more int, containers []string) string {
	limit := int32(6) // the API's default
	if job.Spec.BackoffLimit != nil {
		limit = *job.Spec.BackoffLimit
	}
	if more == 0 {
		return ""
	}
	soFar := int32(0)
	for _, p := range list {
		for _, statuses := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses,
			p.Status.ContainerStatuses} {
			for _, s := range statuses {
				soFar += s.RestartCount
			}
		}
	}
	if soFar+int32(coming+more) < max(limit, 1) {
		return ""
	}
	under := ""
	if coming > 0 {
		under = fmt.Sprintf(", %d under way", coming)
	}
	return fmt.Sprintf("a restart of %s would end Job %s: with restartPolicy OnFailure each restart "+
		"counts against its "+
		"backoffLimit, which is %d (%d so far%s); raise spec.backoffLimit of the Job, "+
		"or set annotation %s: \"true\" to restart all the same",
		plural("container", containers), job.Name, limit, soFar, under, IgnoreAnnotation)
}

// plural names one or more of a kind.
func plural(kind string, names []string) string {
	text := kind
	if len(names) > 1 {
		text += "s"
	}
	for i, name := range names {
		if i > 0 {
			text += ","
		}
		text += " " + name
	}
	return text
}

// jobOf reads the Job of a pod whose restarts count. It returns nil if there is none.
func jobOf(ctx context.Context, live client.Reader, pod *corev1.Pod) (*batchv1.Job, error) {
	owner := metav1.GetControllerOf(pod)
	if owner == nil || owner.Kind != "Job" || owner.APIVersion != batchv1.SchemeGroupVersion.String() ||
		pod.Spec.RestartPolicy != corev1.RestartPolicyOnFailure {
		return nil, nil
	}
	job := &batchv1.Job{}
	err := live.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name}, job)
	if apierrors.IsNotFound(err) || err == nil && job.UID != owner.UID {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return job, nil
}

// podsOf returns the pods of a Job whose restarts count: those that are pending or running.
func podsOf(ctx context.Context, live client.Reader, job *batchv1.Job) ([]*corev1.Pod, error) {
	selector, err := metav1.LabelSelectorAsSelector(job.Spec.Selector)
	if err != nil {
		return nil, err
	}
	var all corev1.PodList
	matching := client.MatchingLabelsSelector{Selector: selector}
	if err := live.List(ctx, &all, client.InNamespace(job.Namespace), matching); err != nil {
		return nil, err
	}
	var counted []*corev1.Pod
	for i := range all.Items {
		p := &all.Items[i]
		if metav1.IsControlledBy(p, job) && (p.Status.Phase == corev1.PodRunning ||
			p.Status.Phase == corev1.PodPending) {
			counted = append(counted, p)
		}
	}
	return counted, nil
}
