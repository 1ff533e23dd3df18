// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// act takes the pods further. An error with one pod does not hold up the others.
func (p *pass) act(ctx context.Context) {
	for _, n := range p.plan.Prepare {
		p.ops.Prepare(ctx, p.items[n])
	}
	for _, n := range p.plan.Begin {
		p.settleError(p.items[n], p.step(ctx, p.items[n]))
	}
	for _, i := range p.items {
		if i.Stale {
			continue
		}
		p.teller.warnings(i.Pod, p.work.ops.Finished(i.Ops))
		if relabels := i.Status.Stage == evaluate.Updated && p.target.Workload != nil; (relabels || i.Status.Open) &&
			!p.waits(&i.Ops.API) {
			var err error
			if relabels {
				err = p.pods.relabel(ctx, i, p.target.Workload)
			}
			if i.Status.Open {
				err = errors.Join(p.pods.setGates(ctx, i.Ops, i.Pod, ""), err)
			}
			p.settleError(i, err)
		}
		if i.Status.Ask {
			p.ops.Follow(ctx, i)
		}
		if i.Status.Restart {
			p.ops.Restart(ctx, i)
		}
		if i.Status.Inquire {
			p.ops.Inquire(ctx, i)
		}
		if i.Status.Stage == evaluate.Updating {
			carried := len(i.Ops.Started) > 0 && p.r.driver.Carries(ctx, i.Pod)
			p.wait = retry.Sooner(p.wait, p.pods.nudge(ctx, i, carried))
		}
	}
}

// settleError decides what to do about a pod whose change the API server has answered with an
// error.
func (p *pass) settleError(i *nodeops.Item, err error) {
	why := dryrun.Refusal(err)
	switch {
	case err == nil:
		if !i.Stale && !p.now.Before(i.Ops.API.Until) {
			i.Ops.API = dryrun.Trouble{}
		}
	case apierrors.IsConflict(err), apierrors.IsNotFound(err):
		p.wait = retry.Sooner(p.wait, max(requeue.StaleInterval, p.work.gather()))
	case why == nil:
		i.Ops.API.Note(err, p.now)
		p.waits(&i.Ops.API)
		if p.now.Sub(i.Ops.API.Since) < p.strategy.Deadline {
			return
		}
		late := dryrun.TooLong(i.Pod.Name, p.strategy.Deadline, err)
		why = &late
		fallthrough
	default:
		i.Ops.API.Note(err, p.now) // a gate that cannot be opened is tried again
		p.ops.AbortUpgrade(i.Ops, why.Message)
		i.Ops.Refused = why
		p.wait = retry.Sooner(p.wait, requeue.StaleInterval)
	}
}

// waits returns true if it is too early to ask the API server again, and has the rollout looked at
// when the time has come.
func (p *pass) waits(t *dryrun.Trouble) bool {
	left := t.Until.Sub(p.now)
	if left > 0 {
		p.wait = retry.Sooner(p.wait, left)
	}
	return left > 0
}

// step takes a pod that the rollout changes now one step further.
func (p *pass) step(ctx context.Context, i *nodeops.Item) error {
	i.Ops.Updating = true
	if i.Stale || p.waits(&i.Ops.API) {
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
			return p.pods.setGates(ctx, i.Ops, i.Pod, p.rollout.UID)
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
	after, err := p.pods.patch(ctx, i, patch)
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
