// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/notice"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
)

// podWriter writes pods, and remembers what it has written.
type podWriter struct {
	client  client.Client
	metrics *notice.Metrics
	rollout *inplace.InPlaceRollout
	now     time.Time
	log     logrus.FieldLogger
}

// setGates closes the pod's gates for a rollout. With an empty UID it opens them.
func (w *podWriter) setGates(
	ctx context.Context, m *nodeops.PodOps, pod *corev1.Pod, rollout types.UID,
) error {
	after, err := gates.Set(ctx, w.client, pod, rollout, "changes containers of InPlaceRollout "+w.rollout.Name,
		stamp(w.now).Time)
	if err != nil {
		if rollout != "" {
			err = dryrun.Denied(err, "pod "+pod.Name)
		}
		return err // a gate that cannot be opened is tried again
	}
	m.Fresh.Wrote(after)
	w.metrics.Wrote("pod status")
	w.log.WithField("pod", pod.Name).Debugf("gates: out of service %v", rollout != "")
	return nil
}

// relabel sets the label of revision of a pod that has got its images in another way.
func (w *podWriter) relabel(ctx context.Context, i *nodeops.Item, from workload.Workload) error {
	if !i.Unlabelled {
		return nil
	}
	meta := map[string]any{"uid": i.Pod.UID, "resourceVersion": i.Pod.ResourceVersion,
		"labels": map[string]any{podtemplate.RevisionLabel: from.RevisionLabel(&i.PodRef, nil)}}
	if from.NeedsRestart(i.Pod) { // as in a pod made anew
		var at any
		if value := podtemplate.Of(from.Object()).Annotations[evaluate.RestartedAt]; value != "" {
			at = value
		}
		meta["annotations"] = map[string]any{evaluate.RestartedAt: at}
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	_, err = w.patch(ctx, i, patch)
	return err
}

// patch writes a patch of a pod, and returns the pod as it is then.
func (w *podWriter) patch(ctx context.Context, i *nodeops.Item, patch []byte) (*corev1.Pod, error) {
	after := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: i.Pod.Namespace, Name: i.Pod.Name}}
	err := w.client.Patch(ctx, after, client.RawPatch(types.StrategicMergePatchType, patch))
	if err == nil {
		i.Ops.Fresh.Wrote(after)
		w.metrics.Wrote("pod")
	}
	return after, err
}

// nudge makes kubelet probe a new container that is not ready at once, if that is due. wait is how
// long until the next one is.
func (w *podWriter) nudge(ctx context.Context, i *nodeops.Item, carried bool) (wait time.Duration) {
	var names []string
	for _, name := range objects.SortedKeys(i.Ops.State.Containers) {
		c := pods.Changeable(i.Pod, name)
		cs := pods.Status(i.Pod, name)
		if c == nil || cs == nil || cs.ContainerID == i.Ops.State.Containers[name].ID {
			continue
		}
		if passed, _ := pods.StartupPassed(c, cs, i.Ops.Started[cs.ContainerID], carried, w.now); passed {
			names = append(names, name)
		}
	}
	container, wait := i.Ops.Nudges.Due(i.Pod, names, w.now)
	if container == "" {
		return wait
	}
	log := w.log.WithField("pod", i.Pod.Name).WithField("container", container)
	pod, err := i.Ops.Nudges.Nudge(ctx, w.client, i.Pod, container)
	if err != nil {
		log.WithError(err).Info("kubelet could not be made to probe the new container at once") // it will in its time
		return wait
	}
	i.Ops.Fresh.Wrote(pod)
	w.metrics.Wrote("pod")
	log.Debug("kubelet made to probe the new container at once")
	return wait
}

// stamp returns the time in the API's resolution of one second, rounded up, so that a wait that is
// counted from it is never too short.
func stamp(now time.Time) metav1.Time {
	return metav1.NewTime(now.Add(time.Second - 1).Truncate(time.Second))
}
