// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// kubelet says how the kubelets behave: how long until they see a change, and until a new container
// is ready. An image whose name ends with :crash ends at once, with :slow never gets ready, with
// :gone cannot be pulled.
type kubelet struct {
	sync, start time.Duration
	// hold says that nodes hold probes.
	hold bool
}

func setReady(pod *corev1.Pod, containers bool) {
	set := func(kind corev1.PodConditionType, is bool) {
		status := corev1.ConditionFalse
		if is {
			status = corev1.ConditionTrue
		}
		if c := pods.Condition(pod, kind); c == nil {
			pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: kind, Status: status,
				LastTransitionTime: metav1.Now()})
		} else if c.Status != status {
			c.Status, c.LastTransitionTime = status, metav1.Now()
		}
	}
	set(corev1.ContainersReady, containers)
	ready := containers
	for _, g := range pod.Spec.ReadinessGates {
		c := pods.Condition(pod, g.ConditionType)
		ready = ready && c != nil && c.Status == corev1.ConditionTrue
	}
	set(corev1.PodReady, ready)
}

// status changes a pod's status as its kubelet does.
func (b *bed) status(key types.NamespacedName, uid types.UID, change func(*corev1.Pod) bool) {
	b.change(key, uid, func(pod *corev1.Pod) bool {
		if !change(pod) {
			return false
		}
		ready := true
		for _, c := range pod.Status.ContainerStatuses {
			ready = ready && c.Ready
		}
		setReady(pod, ready)
		return true
	})
}

// kubeletSync is a pod worker that looks at the pod once, some time after a change.
func (b *bed) kubeletSync(key types.NamespacedName) {
	pod := b.stored(key)
	if pod == nil || pod.Spec.NodeName == "" {
		return
	}
	b.syncConditions(key, pod.UID)
	stale := false
	for _, c := range pod.Spec.Containers {
		cs := pods.Status(pod, c.Name)
		stale = stale || !asked(cs, c.Image) && (cs == nil || cs.State.Waiting == nil ||
			!strings.Contains(cs.State.Waiting.Message, c.Image))
	}
	if !stale || !retry.Sleep(b.ctx, b.kubelet.sync) {
		return
	}
	pod = b.stored(key)
	if pod == nil {
		return
	}
	for _, c := range pod.Spec.Containers {
		cs := pods.Status(pod, c.Name)
		if asked(cs, c.Image) {
			continue
		}
		if strings.HasSuffix(c.Image, ":gone") {
			b.status(key, pod.UID, func(p *corev1.Pod) bool {
				cs := pods.Status(p, c.Name)
				cs.Ready, cs.State = false,
					corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff",
						Message: "Back-off pulling image \"" + c.Image + "\""}}
				return true
			})
			continue
		}
		b.runContainer(key, pod.UID, pod.Spec.NodeName, c.Name, c.Image)
	}
}

// asked says that a container is of the image, as far as kubelet is concerned.
func asked(cs *corev1.ContainerStatus, image string) bool {
	return cs != nil && cs.ContainerID != "" && strings.TrimPrefix(cs.Image, "docker.io/library/") == image &&
		cs.State.Waiting == nil
}

// syncConditions lets Ready follow the gates.
func (b *bed) syncConditions(key types.NamespacedName, uid types.UID) {
	b.status(key, uid, func(p *corev1.Pod) bool {
		if len(p.Spec.ReadinessGates) == 0 || len(p.Status.ContainerStatuses) == 0 {
			return false
		}
		before := pods.Condition(p, corev1.PodReady)
		was := before != nil && before.Status == corev1.ConditionTrue
		q := p.DeepCopy()
		ready := true
		for _, c := range q.Status.ContainerStatuses {
			ready = ready && c.Ready
		}
		setReady(q, ready)
		now := pods.Condition(q, corev1.PodReady).Status == corev1.ConditionTrue
		return was != now
	})
}

// runContainer replaces a container; it becomes ready after a while if the image is good.
func (b *bed) runContainer(key types.NamespacedName, uid types.UID, node, name, image string) {
	b.mu.Lock()
	b.serial++
	id := fmt.Sprintf("c%d-%s", b.serial, name)
	start := b.kubelet.start
	b.mu.Unlock()
	b.fleet.adopt(node, string(uid), name, image, id)
	crash, slow := strings.HasSuffix(image, ":crash"), strings.HasSuffix(image, ":slow")
	done := false
	b.status(key, uid, func(p *corev1.Pod) bool {
		if c := pods.Changeable(p, name); c == nil || c.Image != image {
			return false
		}
		cs := pods.Status(p, name)
		if cs == nil {
			p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{Name: name})
			cs = pods.Status(p, name)
		} else if asked(cs, image) {
			return false // another worker was quicker
		}
		if cs.ContainerID != "" {
			cs.LastTerminationState = corev1.ContainerState{
				Terminated: &corev1.ContainerStateTerminated{ContainerID: cs.ContainerID, StartedAt: metav1.Now(),
					FinishedAt: metav1.Now()}}
		}
		p.Status.Phase = corev1.PodRunning
		cs.ContainerID, cs.Image, cs.ImageID, cs.Ready = "containerd://"+id, "docker.io/library/"+image,
			b.content(image), false
		cs.RestartCount++
		cs.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
		if crash {
			cs.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error",
				ContainerID: cs.ContainerID, StartedAt: metav1.Now(), FinishedAt: metav1.Now()}}
		}
		if c := pods.Changeable(p, name); c.StartupProbe != nil && !crash {
			b.carry(cs)
		} else {
			started := !crash
			cs.Started = &started
		}
		done = true
		return true
	})
	if !done || crash || slow {
		return
	}
	if c := pods.Changeable(b.stored(key), name); c.StartupProbe != nil {
		b.startupWorker(key, uid, name, id, time.Duration(c.StartupProbe.PeriodSeconds)*time.Second, start)
		return
	}
	b.wg.Go(func() {
		if !retry.Sleep(b.ctx, start) {
			return
		}
		b.status(key, uid, func(p *corev1.Pod) bool {
			cs := pods.Status(p, name)
			if cs == nil || cs.ContainerID != "containerd://"+id {
				return false
			}
			cs.Ready = true
			return true
		})
	})
}

// carriedBy says that the kubelet of the nodes is one since 1.35.
func (b *bed) carriedBy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return pods.CarriesStarted(b.nodes["node-0"])
}

// carry is what kubelet says of a new container that runs where another one ran: since 1.35 it has
// started if that one had (kubelet_pods.go convertToAPIContainerStatuses), and without a
// readinessProbe it is ready then.
func (b *bed) carry(cs *corev1.ContainerStatus) {
	started := b.carriedBy() && cs.Started != nil && *cs.Started
	cs.Started, cs.Ready = &started, started
	if b.kubelet.hold && started {
		cs.State.Running.StartedAt = metav1.NewTime(time.Now().Add(14 * time.Second).Truncate(time.Second))
	}
}

// startupWorker is kubelet's worker for a startupProbe, whose tick is as late as it may be: the
// first one finds the new container, the later ones probe it. The application needs some time until
// it answers.
func (b *bed) startupWorker(key types.NamespacedName, uid types.UID, name, id string, period, needs time.Duration) {
	set := func(is bool) bool {
		there := false
		b.status(key, uid, func(p *corev1.Pod) bool {
			cs := pods.Status(p, name)
			if there = cs != nil && cs.ContainerID == "containerd://"+id; !there {
				return false
			}
			cs.Started, cs.Ready = &is, is
			return true
		})
		return there
	}
	b.mu.Lock()
	b.serves[uid] = time.Now().Add(needs)
	b.mu.Unlock()
	b.wg.Go(func() {
		begun := time.Now()
		for retry.Sleep(b.ctx, period) {
			if time.Since(begun) < needs {
				if !set(false) {
					return
				}
				continue
			}
			set(true)
			return
		}
	})
}

// swapped is what a restart by the node looks like to the kubelet.
func (b *bed) swapped(podUID, container, id string) {
	for _, pod := range b.pods() {
		if string(pod.UID) != podUID {
			continue
		}
		b.status(client.ObjectKeyFromObject(pod), pod.UID, func(p *corev1.Pod) bool {
			cs := pods.Status(p, container)
			cs.ContainerID, cs.RestartCount = "containerd://"+id, cs.RestartCount+1
			if c := pods.Changeable(p, container); c.ImagePullPolicy == corev1.PullAlways {
				cs.ImageID = b.content(c.Image)
			}
			cs.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
			if c := pods.Changeable(p, container); c.StartupProbe != nil {
				b.carry(cs)
			}
			return true
		})
		if c := pods.Changeable(pod, container); c.StartupProbe != nil {
			b.startupWorker(client.ObjectKeyFromObject(pod), pod.UID, container, id,
				time.Duration(c.StartupProbe.PeriodSeconds)*time.Second, b.kubelet.start)
		}
	}
}

// runs is the image that a pod's container runs.
func (b *bed) runs(podUID, container string) string {
	for _, pod := range b.pods() {
		if string(pod.UID) == podUID {
			return runningImage(pod, container)
		}
	}
	return ""
}

// content is what a tag names now.
func (b *bed) content(image string) string {
	b.tags.Lock()
	defer b.tags.Unlock()
	if id := b.contents[image]; id != "" {
		return id
	}
	return "id of " + image
}

// moveTag lets a tag name something else from now on.
func (b *bed) moveTag(image, content string) {
	b.tags.Lock()
	defer b.tags.Unlock()
	if b.contents == nil {
		b.contents = map[string]string{}
	}
	b.contents[image] = content
}

// moved says that the tag of a pod's container names another image than the one that runs.
func (b *bed) moved(podUID, container string) bool {
	for _, pod := range b.pods() {
		if string(pod.UID) == podUID {
			c := pods.Changeable(pod, container)
			return pods.Status(pod, container).ImageID != b.content(c.Image)
		}
	}
	return false
}
