// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// step takes a pod that the rollout changes now one step further.
func (p *pass) step(ctx context.Context, i *nodeops.Item) error {
	i.Ops.Updating = true
	if i.Stale || p.waits(&i.Ops.Api) {
		return nil
	}
	if len(i.Status.CheckTags) > 0 { // a gate was closed before the controller was started
		p.ops.Prepare(ctx, i)
		return nil
	}
	if spared, err := p.sparesJob(ctx, i); !spared || err != nil {
		return err
	}
	if len(evaluate.Gates(i.Pod)) > 0 {
		shut, since := evaluate.OutOfServiceBy(i.Pod)
		if shut != p.rollout.UID {
			return p.setGates(ctx, i, p.rollout.UID)
		}
		if left := since.Add(p.strategy.Drain).Sub(p.now); p.strategy.Drain > 0 && left > 0 {
			p.wait = retry.Sooner(p.wait, left)
			return nil
		}
	}
	_, running := evaluate.RunningIDs(i.Pod, objects.SortedKeys(i.Status.Images))
	if len(i.Status.Images) == 0 || i.Ops.Plain || !running {
		return p.write(ctx, i, "")
	}
	uid, phase := p.ops.Upgrade(i)
	switch {
	case uid == "":
		p.ops.Prepare(ctx, i) // a container has been replaced meanwhile
	case phase == opsv1.Phase_PHASE_PREPARED:
		p.ops.Commit(i)
	case opsv1.Armed(phase):
		return p.write(ctx, i, uid)
	}
	return nil
}

// sparesJob returns true if the change of a pod would not end its Job: each new container counts as
// a restart there.
func (p *pass) sparesJob(ctx context.Context, i *nodeops.Item) (bool, error) {
	if p.rollout.Annotations[jobbudget.IgnoreAnnotation] == "true" {
		return true, nil
	}
	containers := map[string]string{}
	for _, name := range append(objects.SortedKeys(i.Status.Images), i.Status.Restarts...) {
		if cs := pods.Status(i.Pod, name); cs != nil && cs.ContainerID != "" {
			containers[name] = cs.ContainerID
		}
	}
	why, err := p.r.Jobs.Take(ctx, p.r.APIReader, i.Pod, takenAs(p.rollout, i.Pod), containers)
	if why == "" || err != nil {
		return err == nil, err
	}
	p.ops.AbortUpgrade(i.Ops, why)
	i.Ops.Refused = &evaluate.Failure{Reason: evaluate.FailEndsJob, Message: why}
	p.wait = retry.Sooner(p.wait, requeue.StaleInterval)
	return false, nil
}

// takenAs returns the name under which the restarts in a pod are counted.
func takenAs(rollout *inplace.InPlaceRollout, pod *corev1.Pod) string {
	return string(rollout.UID) + "." + string(pod.UID)
}

// setGates closes the pod's gates for a rollout. With an empty UID it opens them.
func (p *pass) setGates(ctx context.Context, i *nodeops.Item, rollout types.UID) error {
	after, err := gates.Set(ctx, p.r.Client, i.Pod, rollout, "changes containers of InPlaceRollout "+p.rollout.Name,
		stamp(p.now).Time)
	if err != nil {
		if rollout != "" {
			err = dryrun.Denied(err, "pod "+i.Pod.Name)
		}
		return err // a gate that cannot be opened is tried again
	}
	i.Ops.Fresh.Wrote(after)
	p.r.Metrics.Wrote("pod status")
	p.log.WithField("pod", i.Pod.Name).Debugf("gates: out of service %v", rollout != "")
	return nil
}

// write changes the pod, and checks what admission has made of the change.
func (p *pass) write(ctx context.Context, i *nodeops.Item, operation string) error {
	answers := i.Ops.AnswersOf(p.work.ops)
	change := p.ops.Change(i, operation, answers)
	if operation == "" && len(change.Images) > 0 { // nobody has asked yet
		got, more, err := dryrun.Pod(ctx, p.r.Client, i.Pod, change)
		if err != nil {
			return err
		}
		answers = got
		if len(more) > 0 {
			p.work.ops.LearnMore(i.Ops, nil, more)
			p.wait = retry.Sooner(p.wait, requeue.StaleInterval) // all of them are changed together
			return nil
		}
		p.work.ops.Learn(i.Ops, nil, change.Images, answers)
		for name, image := range change.Images {
			if c := pods.Changeable(i.Pod, name); c.Image == answers.Of(name, image) {
				p.wait = retry.Sooner(p.wait, requeue.StaleInterval) // it is there: the others are changed without it
				return nil
			}
		}
		change = p.ops.Change(i, operation, answers)
	}
	patch, err := change.Patch(i.Pod.ResourceVersion)
	if err != nil {
		return err
	}
	after, err := p.patchPod(ctx, i, patch)
	if err != nil {
		return dryrun.Denied(err, "pod "+i.Pod.Name)
	}
	if operation == "" {
		p.ops.AbortMarked(i.Ops, "the pod was changed otherwise")
	}
	p.log.WithField("pod", i.Pod.Name).WithField("op", operation).WithField("revision",
		i.Goal.Revision).Info("pod changed")
	got := evaluate.RewritesOf(change.Images, podtemplate.PodImages(after))
	if name, differs := got.Differs(answers, change.Images); differs {
		asked := change.Images[name]
		return dryrun.Unsteady("pod "+i.Pod.Name, name, asked, answers.Of(name, asked), got.Of(name, asked))
	}
	return nil
}

// relabel sets the label of revision of a pod that has got its images in another way.
func (p *pass) relabel(ctx context.Context, i *nodeops.Item) error {
	if !i.Unlabelled {
		return nil
	}
	meta := map[string]any{"uid": i.Pod.UID, "resourceVersion": i.Pod.ResourceVersion,
		"labels": map[string]any{podtemplate.RevisionLabel: p.target.Workload.RevisionLabel(&i.PodRef, nil)}}
	if p.target.Workload.NeedsRestart(i.Pod) { // as in a pod made anew
		var at any
		if value := podtemplate.Of(p.target.Workload.Object()).Annotations[evaluate.RestartedAt]; value != "" {
			at = value
		}
		meta["annotations"] = map[string]any{evaluate.RestartedAt: at}
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	_, err = p.patchPod(ctx, i, patch)
	return err
}

// patchPod writes a patch of a pod, and returns the pod as it is then.
func (p *pass) patchPod(ctx context.Context, i *nodeops.Item, patch []byte) (*corev1.Pod, error) {
	after := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: i.Pod.Namespace, Name: i.Pod.Name}}
	err := p.r.Client.Patch(ctx, after, client.RawPatch(types.StrategicMergePatchType, patch))
	if err == nil {
		i.Ops.Fresh.Wrote(after)
		p.r.Metrics.Wrote("pod")
	}
	return after, err
}

// stamp returns the time in the API's resolution of one second, rounded up, so that a wait that is
// counted from it is never too short.
func stamp(now time.Time) metav1.Time {
	return metav1.NewTime(now.Add(time.Second - 1).Truncate(time.Second))
}
