// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/nodeops"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
)

// gather finds out how far each pod is.
func (p *pass) gather(ctx context.Context) {
	there := map[types.UID]bool{}
	begun := p.now
	if t := p.rollout.Status.StartTime; t != nil {
		begun = t.Time
	}
	for _, pod := range p.target.Pods {
		m := p.ops.Pod(pod, p.goal.Revision)
		there[pod.UID] = true
		if !pods.Active(pod) {
			if pod.DeletionTimestamp == nil && m.State.IsOf(p.goal) {
				p.ended = append(p.ended, pod)
			}
			continue
		}
		i := &nodeops.Item{PodRef: evaluate.PodRef{Pod: pod, State: m.State, Goal: p.goal.ForPod(m.State)}, Ops: m,
			Ordinal: -1, Stale: m.Fresh.Stale(pod)}
		if w := p.target.Workload; w != nil && !p.goal.Undo && w.NeedsRestart(pod) {
			i.Goal.Restarts = pods.Names(pod)
		}
		if p.target.Ordered {
			i.Ordinal = ordinalOf(pod.Name)
		}
		if !i.Stale {
			m.NoteReady(pod, p.now)
			m.NoteStarted(pod, p.now)
		}
		p.ops.SettlePreparation(i)
		p.ops.SettleTags(i)
		k := p.work.ops.Knowledge(m, pod, begun)
		k.Carried = len(m.Started) > 0 && p.r.driver.Carries(ctx, pod)
		i.Facts, i.Status = k, evaluate.Pod(pod, m.State, i.Goal, k, &p.strategy, p.now)
		p.wait = retry.Sooner(p.wait, i.Status.Wait)
		if s := i.Status.Stage; p.target.Workload != nil && (s == evaluate.Outdated && !m.Updating ||
			s == evaluate.Updated && !p.goal.Undo || s == evaluate.Broken &&
			i.Status.Failure.Reason == evaluate.FailNoContainer) {
			if why := p.target.Workload.NotInPlaceReason(pod); why != "" {
				i.Status.Stage, p.notInPlaceReason = evaluate.Skipped, why
			} else if p.blocked != "" && s == evaluate.Broken {
				i.Status.Stage = evaluate.Skipped // that is not known yet
			}
		}
		if p.target.Workload != nil && i.Status.Stage == evaluate.Updated {
			label := p.target.Workload.RevisionLabel(&i.PodRef, nil)
			i.Unlabelled = label != "" && label != pod.Labels[podtemplate.RevisionLabel]
		}
		if v := &i.Status; !i.Stale && (v.Recovered || v.Stage == evaluate.Broken && !v.Disrupted ||
			v.Stage == evaluate.Updated && v.Available) {
			if m.Updating {
				p.r.Jobs.Return(takenAs(p.rollout, pod))
			}
			m.Updating, m.Settled = false, v.Recovered || m.Settled
			v.Disrupted = v.Open
		}
		p.items = append(p.items, i)
	}
	p.ops.Keep(there)
}

// decide plans which pods are next.
func (p *pass) decide(ctx context.Context, halted bool) error {
	s := &p.strategy
	candidates := make([]evaluate.Candidate, len(p.items))
	failed := false
	for n, i := range p.items {
		shut, _ := evaluate.OutOfServiceBy(i.Pod)
		updating := i.Ops.Updating || shut == p.rollout.UID && i.Status.Stage == evaluate.Outdated
		candidates[n] = evaluate.Candidate{
			Pod: i.Pod, Ordinal: i.Ordinal, Status: i.Status, Updating: updating, Preparation: p.ops.Preparation(i),
		}
		failed = failed || i.Status.Stage == evaluate.Broken
	}
	l := evaluate.Limits{
		Desired: p.target.Desired, MaxUnavailable: s.UnavailableLimit(p.target.Desired),
		Keep: evaluate.Resolve(s.Partition, p.target.Desired, true), FirstOrdinal: p.target.FirstOrdinal,
		Ordered: p.target.Ordered,
		Halted:  halted || p.rollout.Spec.Paused,
	}
	if p.goal.Undo {
		l.Keep = 0
	} else if (failed || len(p.ended) > 0) && s.OnFailure != inplace.Continue {
		l.Halted = true
	}
	var budgets []*evaluate.Disruptions
	read := false
	var err error
	l.Allowed = func(pod *corev1.Pod) (bool, string) {
		if !read {
			read = true
			budgets, err = evaluate.Budgets(ctx, p.r.Client, p.rollout.Namespace, candidates, doomed(p.items))
		}
		if err != nil {
			return false, err.Error()
		}
		return evaluate.Take(budgets, pod)
	}
	p.plan = evaluate.Next(candidates, l)
	if err != nil {
		return err
	}
	if p.plan.Blocked != "" {
		p.wait = retry.Sooner(p.wait, requeue.BlockedInterval)
	}
	return nil
}

// doomed returns a function that says whether this rollout is about to disrupt a pod.
func doomed(items []*nodeops.Item) func(*corev1.Pod) bool {
	pods := map[types.UID]bool{}
	for _, i := range items {
		pods[i.Pod.UID] = i.Status.Disrupted
	}
	return func(pod *corev1.Pod) bool { return pods[pod.UID] }
}

// ordinalOf returns the number at the end of a name; -1 if there is none.
func ordinalOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		return -1
	}
	return n
}
