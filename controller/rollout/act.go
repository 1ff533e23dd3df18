// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
)

// roundsMax is how often the preparation of a pod is begun anew.
const roundsMax = 8

// item is a pod in a pass.
type item struct {
	pod     *corev1.Pod
	m       *member
	goal    goal
	known   knowledge
	verdict verdict
	ordinal int
	stale   bool
	// unlabelled says that the pod is of another revision than its label tells.
	unlabelled bool
}

// armed says that the pod may be patched.
func armed(phase opsv1.Phase) bool {
	switch phase {
	case opsv1.Phase_PHASE_ARMED, opsv1.Phase_PHASE_ADOPTING, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING, opsv1.Phase_PHASE_REVEALING, opsv1.Phase_PHASE_SUCCEEDED:
		return true
	}
	return false
}

// settlePreparation decides what becomes of a preparation that has ended without the pod having been changed.
func (p *pass) settlePreparation(i *item) {
	w, m := p.work, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	t := m.visit
	if t == nil || t.over || i.stale || m.mark.by(i.goal) && t.uid == m.mark.Operation {
		return
	}
	once, unchanged, held := false, false, false
	switch {
	case t.same:
		m.visit = nil
		return
	case t.failed != nil && !t.stale:
		if !t.takenBack {
			t.takenBack = true
			p.abort(m.node, t, t.failed.message)
		}
		m.gaveWay = false
	case t.failed != nil:
		once = t.stale
		m.gaveWay = m.gaveWay && t.stale && !t.committed
		held = m.gaveWay
	case t.op.GetFinishTime() != nil && t.op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED:
		c := culprit(t.op)
		t.failed = &failure{failPreparation, accountOf(t.op)}
		if c.GetReason() != "" {
			t.failed.reason = c.GetReason()
		}
		// Somebody's restart goes before a preparation (ops), which then finds another container:
		// neither is the pod's fault.
		m.gaveWay = !t.committed && (c.GetReason() == reasonCancelled || m.gaveWay && c.GetReason() == reasonDiffers)
		held = c.GetReason() == reasonHeld || m.gaveWay
		once, unchanged = slices.Contains(again, c.GetReason()), c.GetReason() == reasonUnchanged
	case t.op.GetPhase() != opsv1.Phase_PHASE_PREPARED && !armed(t.op.GetPhase()):
		if left := t.begun.Add(p.strategy.deadline + prepareSlack).Sub(p.now); left > 0 {
			p.wait = sooner(p.wait, left)
			return
		}
		t.failed = &failure{failDeadline, fmt.Sprintf("node %s has not made the images ready within %s", m.node.Name, p.strategy.deadline)}
		t.takenBack = true
		p.abort(m.node, t, "it took too long")
	default:
		m.gaveWay = false
		return
	}
	switch {
	case held, once && m.tries < roundsMax:
		if m.round++; !held { // a budget may hold a pod back for days
			m.tries++
		}
		m.visit = nil
		after := min(tellPause<<m.tries, tellPauseMax)
		if m.gaveWay {
			after = gaveWayPause
		}
		p.again(m, after)
	case i.goal.undo, unchanged:
		// What was before must come back, with the node's help or without, and what runs already needs none.
		m.plain, m.visit = true, nil
	}
}

// again looks at a pod again after a while.
func (p *pass) again(m *member, after time.Duration) {
	m.retryAt, p.wait = p.now.Add(after), sooner(p.wait, after)
}

// preparation is how far the node is with all that the pod needs.
func (p *pass) preparation(i *item) readiness { return min(p.looking(i), p.imagesReady(i)) }

// imagesReady is how far the node is with the images.
func (p *pass) imagesReady(i *item) readiness {
	if len(i.verdict.images) == 0 || i.m.plain {
		return prepared
	}
	if _, running := idsOf(i.pod, sortedKeys(i.verdict.images)); !running {
		return prepared // there is nothing to take over from
	}
	p.work.mu.Lock()
	defer p.work.mu.Unlock()
	t := i.m.visit
	switch {
	case t == nil || t.uid != p.upgradeUID(i):
		if p.now.Before(i.m.retryAt) {
			return preparing
		}
		return unprepared
	case t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED || armed(t.op.GetPhase()):
		return prepared
	}
	return preparing
}

// step takes a pod whose turn it is a step further.
func (p *pass) step(ctx context.Context, i *item) error {
	i.m.turn = true
	if i.stale || p.waits(&i.m.api) {
		return nil
	}
	if len(i.verdict.looks) > 0 { // a gate was closed before the controller was started
		p.prepare(ctx, i)
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
	_, running := idsOf(i.pod, sortedKeys(i.verdict.images))
	if len(i.verdict.images) == 0 || i.m.plain || !running {
		return p.write(ctx, i, "")
	}
	p.work.mu.Lock()
	t := i.m.visit
	current := t != nil && t.uid == p.upgradeUID(i)
	var phase opsv1.Phase
	if current {
		phase = t.op.GetPhase()
	}
	p.work.mu.Unlock()
	switch {
	case !current:
		p.prepare(ctx, i) // a container has been replaced meanwhile
	case phase == opsv1.Phase_PHASE_PREPARED:
		p.commit(i)
	case armed(phase):
		return p.write(ctx, i, t.uid)
	}
	return nil
}

// sparesJob says that a pod may be changed as far as its Job is concerned: a new container counts as a restart, whatever makes it.
func (p *pass) sparesJob(ctx context.Context, i *item) (bool, error) {
	if p.rollout.Annotations[jobbudget.IgnoreAnnotation] == "true" {
		return true, nil
	}
	containers := map[string]string{}
	for _, name := range append(sortedKeys(i.verdict.images), i.verdict.restarts...) {
		if cs := statusOf(i.pod, name); cs != nil && cs.ContainerID != "" {
			containers[name] = cs.ContainerID
		}
	}
	why, err := p.r.Jobs.Take(ctx, p.r.APIReader, i.pod, p.takenAs(i.pod), containers)
	if why == "" || err != nil {
		return err == nil, err
	}
	p.work.mu.Lock()
	p.abort(i.m.node, i.m.visit, why)
	p.work.mu.Unlock()
	i.m.refused = &failure{failEndsJob, why}
	p.wait = sooner(p.wait, stalePause)
	return false, nil
}

// takenAs is the name under which restarts in a pod are counted.
func (p *pass) takenAs(pod *corev1.Pod) string { return string(p.rollout.UID) + "." + string(pod.UID) }

// setGates closes the pod's gates for a rollout, or with an empty UID opens them.
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

// change is what is to be written into the pod, with what the API server has answered to it before.
func (p *pass) change(i *item, operation string, answers rewrites) (*podChange, error) {
	m := &mark{Rollout: p.rollout.UID, Revision: i.goal.revision, Operation: operation, Time: metav1.NewMicroTime(p.now), Containers: map[string]was{}}
	change := &podChange{pod: i.pod, images: i.verdict.images, label: p.newLabel(i)}
	unfinished := i.m.mark != nil && i.m.mark.Rollout == p.rollout.UID && i.m.mark.Time.After(p.lastSuccess())
	for _, name := range append(sortedKeys(i.verdict.images), i.verdict.restarts...) {
		c, _ := containerOf(i.pod, name)
		w := was{Image: c.Image, Base: c.Image}
		if cs := statusOf(i.pod, name); cs != nil {
			w.ID, w.ImageID = cs.ContainerID, cs.ImageID
		}
		if unfinished {
			if old := i.m.mark.Containers[name]; old.Base != "" {
				w.Base = old.Base
			}
		}
		if i.verdict.images[name] != "" {
			w.rewrite = answers[name]
		}
		m.Containers[name] = w
	}
	if unfinished { // containers that are not changed now can still be undone
		for name, old := range i.m.mark.Containers {
			if c, _ := containerOf(i.pod, name); c != nil && old.Base != "" && old.Base != c.Image {
				if _, ok := m.Containers[name]; !ok {
					m.Containers[name] = old
				}
			}
		}
	}
	for name := range i.goal.images {
		if a, known := i.known.answers[name]; known && i.verdict.images[name] == "" {
			if m.There == nil {
				m.There = rewrites{}
			}
			m.There[name] = a
		}
	}
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	change.annotations = map[string]any{inplace.PodStateAnnotation: string(text)}
	return change, nil
}

// write changes the pod, and looks at what has become of it.
func (p *pass) write(ctx context.Context, i *item, operation string) error {
	answers := i.m.answersOf(p.work)
	change, err := p.change(i, operation, answers)
	if err != nil {
		return err
	}
	if operation == "" && len(change.images) > 0 { // nobody has asked yet
		var more map[string]string
		if answers, more, err = p.r.dryRun(ctx, i.pod, change); err != nil {
			return err
		}
		if len(more) > 0 {
			p.work.learnMore(i.m, nil, more)
			p.wait = sooner(p.wait, stalePause) // all of them are changed together
			return nil
		}
		p.work.learn(i.m, nil, change.images, answers)
		for name, image := range change.images {
			if c, _ := containerOf(i.pod, name); c.Image == answers.of(name, image) {
				p.wait = sooner(p.wait, stalePause) // it is there: the others are changed without it
				return nil
			}
		}
		if change, err = p.change(i, operation, answers); err != nil {
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
		p.abortMarked(i.m, "the pod was changed otherwise")
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

// relabel gives a pod the label of its revision that has got its images otherwise.
func (p *pass) relabel(ctx context.Context, i *item) error {
	if !i.unlabelled {
		return nil
	}
	meta := map[string]any{"uid": i.pod.UID, "resourceVersion": i.pod.ResourceVersion, "labels": map[string]any{revisionLabel: p.target.workload.revisionLabel(i, nil)}}
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

// lastSuccess is when the rollout last was where it should be.
func (p *pass) lastSuccess() time.Time {
	if t := p.rollout.Status.LastSuccessTime; t != nil {
		return t.Time
	}
	return time.Time{}
}
