// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller"
)

// step takes a pod that the rollout changes now one step further.
func (p *pass) step(ctx context.Context, i *item) error {
	i.m.turn = true
	if i.stale || p.waits(&i.m.api) {
		return nil
	}
	if len(i.verdict.looks) > 0 { // a gate was closed before the controller was started
		p.ops.prepare(ctx, i)
		return nil
	}
	if spared, err := p.sparesJob(ctx, i); !spared || err != nil {
		return err
	}
	if len(gatesOf(i.pod)) > 0 {
		shut, since := shutBy(i.pod)
		if shut != p.rollout.UID {
			return p.setGates(ctx, i, p.rollout.UID)
		}
		if left := since.Add(p.strategy.drain).Sub(p.now); p.strategy.drain > 0 && left > 0 {
			p.wait = sooner(p.wait, left)
			return nil
		}
	}
	_, running := idsOf(i.pod, slices.Sorted(maps.Keys(i.verdict.images)))
	if len(i.verdict.images) == 0 || i.m.plain || !running {
		return p.write(ctx, i, "")
	}
	uid, phase := p.ops.upgrade(i)
	switch {
	case uid == "":
		p.ops.prepare(ctx, i) // a container has been replaced meanwhile
	case phase == opsv1.Phase_PHASE_PREPARED:
		p.ops.commit(i)
	case armed(phase):
		return p.write(ctx, i, uid)
	}
	return nil
}

// sparesJob returns true if the change of a pod would not end its Job: each new container counts as a restart there.
func (p *pass) sparesJob(ctx context.Context, i *item) (bool, error) {
	if p.rollout.Annotations[controller.IgnoreBackoffLimitAnnotation] == "true" {
		return true, nil
	}
	containers := map[string]string{}
	for _, name := range append(slices.Sorted(maps.Keys(i.verdict.images)), i.verdict.restarts...) {
		if cs := statusOf(i.pod, name); cs != nil && cs.ContainerID != "" {
			containers[name] = cs.ContainerID
		}
	}
	why, err := p.r.Jobs.Take(ctx, p.r.APIReader, i.pod, takenAs(p.rollout, i.pod), containers)
	if why == "" || err != nil {
		return err == nil, err
	}
	p.ops.abortVisit(i.m, why)
	i.m.refused = &failure{failEndsJob, why}
	p.wait = sooner(p.wait, stalePause)
	return false, nil
}

// takenAs returns the name under which the restarts in a pod are counted.
func takenAs(rollout *inplace.InPlaceRollout, pod *corev1.Pod) string {
	return string(rollout.UID) + "." + string(pod.UID)
}

// setGates closes the pod's gates for a rollout. With an empty UID it opens them.
func (p *pass) setGates(ctx context.Context, i *item, rollout types.UID) error {
	patch, err := gatePatch(i.pod, rollout, "changes containers of InPlaceRollout "+p.rollout.Name, stamp(p.now).Time)
	if err != nil {
		return err
	}
	target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: i.pod.Namespace, Name: i.pod.Name}}
	if err := p.r.Client.Status().Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch)); err != nil {
		if rollout != "" {
			err = denied(err, "pod "+i.pod.Name)
		}
		return err // a gate that cannot be opened is tried again
	}
	i.m.written = versionOf(target.ResourceVersion)
	p.r.Metrics.wrote("pod status")
	p.log.WithField("pod", i.pod.Name).Debugf("gates: out of service %v", rollout != "")
	return nil
}

// write changes the pod, and checks what admission has made of the change.
func (p *pass) write(ctx context.Context, i *item, operation string) error {
	answers := i.m.answersOf(p.work.ops)
	change, err := p.ops.change(i, operation, answers)
	if err != nil {
		return err
	}
	if operation == "" && len(change.images) > 0 { // nobody has asked yet
		var more map[string]string
		if answers, more, err = dryRun(ctx, p.r.Client, i.pod, change); err != nil {
			return err
		}
		if len(more) > 0 {
			p.work.ops.learnMore(i.m, nil, more)
			p.wait = sooner(p.wait, stalePause) // all of them are changed together
			return nil
		}
		p.work.ops.learn(i.m, nil, change.images, answers)
		for name, image := range change.images {
			if c, _ := containerOf(i.pod, name); c.Image == answers.of(name, image) {
				p.wait = sooner(p.wait, stalePause) // it is there: the others are changed without it
				return nil
			}
		}
		if change, err = p.ops.change(i, operation, answers); err != nil {
			return err
		}
	}
	patch, err := change.patch(i.pod.ResourceVersion)
	if err != nil {
		return err
	}
	target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: i.pod.Namespace, Name: i.pod.Name}}
	if err := p.r.Client.Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch)); err != nil {
		return denied(err, "pod "+i.pod.Name)
	}
	i.m.written = versionOf(target.ResourceVersion)
	if operation == "" {
		p.ops.abortMarked(i.m, "the pod was changed otherwise")
	}
	p.r.Metrics.wrote("pod")
	p.log.WithField("pod", i.pod.Name).WithField("op", operation).WithField("revision", i.goal.revision).Info("pod changed")
	got := rewritesOf(change.images, podImages(target))
	if name, differs := got.differs(answers, change.images); differs {
		asked := change.images[name]
		return unsteady("pod "+i.pod.Name, name, asked, answers.of(name, asked), got.of(name, asked))
	}
	return nil
}

// relabel sets the label of revision of a pod that has got its images in another way.
func (p *pass) relabel(ctx context.Context, i *item) error {
	if !i.unlabelled {
		return nil
	}
	meta := map[string]any{"uid": i.pod.UID, "resourceVersion": i.pod.ResourceVersion, "labels": map[string]any{revisionLabel: p.target.workload.revisionLabel(&i.podRef, nil)}}
	if p.target.workload.restart(i.pod) { // as in a pod made anew
		var at any
		if value := podTemplate(p.target.workload.written()).Annotations[restartedAt]; value != "" {
			at = value
		}
		meta["annotations"] = map[string]any{restartedAt: at}
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta})
	if err != nil {
		return err
	}
	target := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: i.pod.Namespace, Name: i.pod.Name}}
	if err := p.r.Client.Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, patch)); err != nil {
		return err
	}
	i.m.written = versionOf(target.ResourceVersion)
	p.r.Metrics.wrote("pod")
	return nil
}
