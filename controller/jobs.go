// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

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
)

// A restart on command raises the container's restart count, as each restart does, and the Job controller cannot know that nothing has failed:
// for pods with restartPolicy OnFailure it fails the Job, and deletes its pods, when the restart counts of all containers of its
// pods together have come to backoffLimit (pkg/controller/job job_controller.go pastBackoffLimitOnFailure; with a limit of 0 the first one
// is too many). What else can end a Job looks at pods in phase Failed (podFailurePolicy, backoffLimitPerIndex, and backoffLimit with
// restartPolicy Never: getFailJobMessage, isPodFailed), which a container that was replaced does not bring about: kubelet finds its successor
// running. Nor do the exit codes of restartPolicyRules count, RestartAllContainers among them: kubelet looks at the newest container of a
// name (pkg/kubelet/container helpers.go ShouldAllContainersRestart), and never sees the old one end without the new one.

// +kubebuilder:rbac:groups=batch,resources=jobs,verbs=get
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch

// IgnoreBackoffLimitAnnotation is one that, set to "true" on a ContainerRecreateRequest or an InPlaceRollout, lets a restart end the Job of the pod.
const IgnoreBackoffLimitAnnotation = "cri-proxy.io/ignore-backoff-limit"

// takenFor is how long a restart that has been let go is counted although the pods do not show it: the longest that one may take.
const takenFor = time.Hour

// JobBudgets says which restarts the backoffLimit of a Job still has room for, and keeps count of those that were let go and that no pod
// shows yet. It is shared by all who restart containers; the zero value is ready for use. A nil one counts what pods show only.
type JobBudgets struct {
	mu    sync.Mutex
	taken map[string]takenRestarts
}

// takenRestarts are restarts of one operation.
type takenRestarts struct {
	job, pod   types.UID
	containers map[string]string // name → ID of the container that is to be replaced
	at         time.Time
}

// Take says why the containers of a pod, by name and ID, must not be restarted, and is empty if they may be: then they are counted under
// the name of the operation. jobs and pods are read past the cache.
func (b *JobBudgets) Take(ctx context.Context, live client.Reader, pod *corev1.Pod, operation string, containers map[string]string) (string, error) {
	job, err := jobOf(ctx, live, pod)
	if job == nil || err != nil {
		return "", err
	}
	if b == nil {
		b = &JobBudgets{}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	pods, err := podsOf(ctx, live, job)
	if err != nil {
		return "", err
	}
	delete(b.taken, operation)
	coming := 0
	for uid, t := range b.taken {
		if t.job != job.UID {
			continue
		}
		if left := t.left(pods); left == 0 {
			delete(b.taken, uid)
		} else {
			coming += left
		}
	}
	mine := takenRestarts{job.UID, pod.UID, maps.Clone(containers), time.Now()}
	if why := endsJob(job, pods, coming, mine.left(pods), slices.Sorted(maps.Keys(containers))); why != "" {
		return why, nil
	}
	if b.taken == nil {
		b.taken = map[string]takenRestarts{}
	}
	b.taken[operation] = mine
	return "", nil
}

// Return takes the restarts of an operation that has ended off the count.
func (b *JobBudgets) Return(operation string) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.taken, operation)
}

// left is how many of the restarts the pods do not show.
func (t *takenRestarts) left(pods []*corev1.Pod) int {
	if time.Since(t.at) >= takenFor {
		return 0
	}
	i := slices.IndexFunc(pods, func(p *corev1.Pod) bool { return p.UID == t.pod })
	if i < 0 {
		return 0 // what has ended is not counted
	}
	n := 0
	for name, id := range t.containers {
		if s := containerStatus(pods[i], name); s != nil && s.ContainerID == id {
			n++
		}
	}
	return n
}

// WouldEndJob says why containers of a pod must not be restarted, and is empty if they may be. It counts nothing.
func WouldEndJob(ctx context.Context, live client.Reader, pod *corev1.Pod, containers []string) (string, error) {
	job, err := jobOf(ctx, live, pod)
	if job == nil || err != nil {
		return "", err
	}
	pods, err := podsOf(ctx, live, job)
	if err != nil {
		return "", err
	}
	return endsJob(job, pods, 0, len(containers), containers), nil
}

// endsJob compares as pastBackoffLimitOnFailure does, with some restarts more.
func endsJob(job *batchv1.Job, pods []*corev1.Pod, coming, more int, containers []string) string {
	limit := int32(6) // the API's default
	if job.Spec.BackoffLimit != nil {
		limit = *job.Spec.BackoffLimit
	}
	if more == 0 {
		return ""
	}
	restarts := int32(0)
	for _, p := range pods {
		for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
			for _, s := range list {
				restarts += s.RestartCount
			}
		}
	}
	if restarts+int32(coming+more) < max(limit, 1) {
		return ""
	}
	under := ""
	if coming > 0 {
		under = fmt.Sprintf(", %d under way", coming)
	}
	return fmt.Sprintf("a restart of %s would end Job %s: with restartPolicy OnFailure each restart counts against its backoffLimit, which is %d (%d so far%s); "+
		"raise spec.backoffLimit of the Job, or set annotation %s: \"true\" to restart all the same",
		plural("container", containers), job.Name, limit, restarts, under, IgnoreBackoffLimitAnnotation)
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

// jobOf reads the Job whose restarts are counted in the containers of a pod, nil if there is none.
func jobOf(ctx context.Context, live client.Reader, pod *corev1.Pod) (*batchv1.Job, error) {
	owner := metav1.GetControllerOf(pod)
	if owner == nil || owner.Kind != "Job" || owner.APIVersion != batchv1.SchemeGroupVersion.String() || pod.Spec.RestartPolicy != corev1.RestartPolicyOnFailure {
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

// podsOf are the pods of a Job whose restarts are counted: those that are pending or running.
func podsOf(ctx context.Context, live client.Reader, job *batchv1.Job) ([]*corev1.Pod, error) {
	selector, err := metav1.LabelSelectorAsSelector(job.Spec.Selector)
	if err != nil {
		return nil, err
	}
	var list corev1.PodList
	if err := live.List(ctx, &list, client.InNamespace(job.Namespace), client.MatchingLabelsSelector{Selector: selector}); err != nil {
		return nil, err
	}
	var pods []*corev1.Pod
	for i := range list.Items {
		p := &list.Items[i]
		if metav1.IsControlledBy(p, job) && (p.Status.Phase == corev1.PodRunning || p.Status.Phase == corev1.PodPending) {
			pods = append(pods, p)
		}
	}
	return pods, nil
}
