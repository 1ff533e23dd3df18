// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
)

// maxSlowest is how many of the nodes that pull the status describes.
const maxSlowest = 5

// Reasons of the conditions about secrets, pins and the speed limit.
const (
	secretsFound   = "Found"
	secretsMissing = "MissingOrInvalid"
	pinsBounded    = "Bounded"
	limitNotKept   = "NotKept"
)

// status is what the status of the job is to say. before is what it says now.
func (t *table) status(before *v1beta1.ImagePullJobStatus) *v1beta1.ImagePullJobStatus {
	s := &v1beta1.ImagePullJobStatus{
		StartTime: before.StartTime, CompletionTime: before.CompletionTime, Conditions: slices.Clone(before.Conditions),
		ObservedGeneration: before.ObservedGeneration, ObservedWork: before.ObservedWork,
		Desired: int32(len(t.nodes)),
	}
	var (
		done           float64
		bytes, counted int64 // of the nodes that say how large the image is
		skipped, busy  nodeStates
	)
	for _, n := range t.nodes {
		share := n.fraction
		switch {
		case n.phase == succeeded || n.verifying:
			s.Succeeded++
			share = 1
		case n.phase == failed:
			s.Failed++
		case n.phase == active:
			s.Active++
			busy = append(busy, n)
		case n.away.Reason != "":
			s.Skipped++
			skipped = append(skipped, n)
		}
		done += share
		if total := n.op.GetBytesTotal(); total > 0 {
			bytes, counted = bytes+total, counted+1
			s.BytesDone += min(n.op.GetBytesDone(), total)
		}
	}
	if counted > 0 {
		s.BytesTotal = bytes + bytes/counted*(int64(len(t.nodes))-counted)
	}
	if s.Desired > 0 {
		s.Percent = int32(100*done/float64(s.Desired) + 1e-6)
		s.Progress = fmt.Sprintf("%d%%", s.Percent)
		s.Message = fmt.Sprintf(report.MessageProgress, math.Floor(1000*done/float64(s.Desired)+1e-5)/10)
		if retries := t.nodes.retries(); retries != "" {
			s.Message += "; " + retries
		}
	} else {
		s.Message = report.MessageNoNodes
	}
	report.SetFailures(s, t.nodes.failures())
	s.SkippedNodes = skipped.describeSkipped()
	s.SlowestNodes = busy.describeSlowest()
	t.setSecrets(s)
	t.nodes.setLimitKept(s)
	if text := t.pinsBounded(); text != "" {
		report.SetCondition(s, v1beta1.ConditionPinned, false, pinsBounded, text)
	} else {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionPinned)
	}
	return s
}

// pinsBounded says what the job does not get of the pins that it asks for; empty if it gets all.
func (t *table) pinsBounded() string {
	var parts []string
	if t.spec.Shortened != "" {
		parts = append(parts, t.spec.Shortened)
	}
	count, example := 0, ""
	for _, n := range t.nodes {
		if why := pull.NotPinned(n.op); why != "" && n.phase == succeeded {
			if count++; count == 1 {
				example = fmt.Sprintf("node %s says: %s", n.name(), report.Shorten(why))
			}
		}
	}
	if count > 0 {
		parts = append(parts,
			fmt.Sprintf("on %d nodes kubelet may remove the image when the disk is full, %s", count, example))
	}
	return strings.Join(parts, "; ")
}

func (t *table) setSecrets(s *v1beta1.ImagePullJobStatus) {
	const kind = v1beta1.ConditionPullSecretsFound
	switch keys := t.keys; {
	case keys == nil:
	case !keys.Asked:
		meta.RemoveStatusCondition(&s.Conditions, kind)
	case len(keys.Wrong) > 0:
		wrong := strings.Join(report.First(keys.Wrong, report.MaxDetails), "; ")
		report.SetCondition(s, kind, false, secretsMissing, wrong)
	default:
		message := ""
		if image := t.spec.Request.GetImage(); !keys.Has(image) { // which may need none
			message = "none of them has credentials for the registry of " + image
		}
		report.SetCondition(s, kind, true, secretsFound, message)
	}
}

// setRunning sets the condition of a job that has not ended.
func (t *table) setRunning(s *v1beta1.ImagePullJobStatus) {
	reason, message := report.Pulling, ""
	switch {
	case t.finished() && s.Desired == 0:
		reason, message = withoutNodes(t.spec.Never)
	case t.finished():
		reason = report.UpToDate
		message = "no node has anything left to do; nodes that join later get the image too"
	case t.spec.Parallelism() == 0:
		reason, message = report.Paused, "parallelism is 0: no node begins to pull"
	case s.Active == 0 && s.Skipped > 0:
		reason = report.Waiting
		message = fmt.Sprintf("%d nodes cannot be commanded now, see skippedNodes; they are tried again", s.Skipped)
	default:
		message = t.nodes.retries()
	}
	report.SetCondition(s, v1beta1.ConditionComplete, false, reason, message)
	meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionSucceeded)
}

// withoutNodes is the condition of a job that has not ended and that matches no node.
func withoutNodes(never bool) (reason, message string) {
	if never {
		return report.NoNodes, "no node matches; nodes that join later get the image"
	}
	return report.Waiting, fmt.Sprintf("no node matches; the job fails if none does within %s of its start",
		noNodesTimeout)
}

// nodeStates are nodes of a job.
type nodeStates []*nodeState

// failures are those of the nodes that have given up.
func (nodes nodeStates) failures() []v1beta1.NodePullFailure {
	var list []v1beta1.NodePullFailure
	for _, n := range nodes {
		if n.phase == failed && !n.verifying {
			list = append(list, n.failure(n.reason, n.message))
		}
	}
	return list
}

// lateFailures are those of the nodes that have given up, and of those that were not done at the
// job's deadline, with how far they were.
func (nodes nodeStates) lateFailures() []v1beta1.NodePullFailure {
	list := nodes.failures()
	for _, n := range nodes {
		if !n.done() {
			list = append(list, n.failure(report.DeadlineExceeded, n.standing()))
		}
	}
	return list
}

func (n *nodeState) failure(reason, message string) v1beta1.NodePullFailure {
	return v1beta1.NodePullFailure{Node: n.name(), Reason: reason, Message: report.Shorten(message)}
}

// describeSkipped says of the first nodes by name why they cannot be commanded. It sorts nodes.
func (nodes nodeStates) describeSkipped() (list []v1beta1.NodePullFailure) {
	slices.SortFunc(nodes, func(a, b *nodeState) int { return strings.Compare(a.name(), b.name()) })
	for _, n := range report.First(nodes, report.MaxDetails) {
		list = append(list, n.failure(n.away.Reason, n.away.Message))
	}
	return list
}

// describeSlowest says how far those nodes are that began first. It sorts nodes.
func (nodes nodeStates) describeSlowest() (list []v1beta1.NodePullProgress) {
	slices.SortStableFunc(nodes, func(a, b *nodeState) int { return a.begun.Compare(b.begun) })
	for _, n := range report.First(nodes, maxSlowest) {
		begun := metav1.NewTime(n.begun)
		list = append(list, v1beta1.NodePullProgress{
			Node: n.name(), Phase: pull.PhaseName(n.op.GetPhase()), Reason: n.op.GetReason(), Message: n.waitsFor(),
			BytesDone: n.op.GetBytesDone(), BytesTotal: n.op.GetBytesTotal(), BytesPerSecond: n.op.GetBytesPerSecond(),
			Attempt: n.op.GetAttempt(), StartTime: &begun,
		})
	}
	return list
}

// waitsFor is what the node waits for, or why it tries again.
func (n *nodeState) waitsFor() string {
	if n.lastFailure == "" && n.op.GetPhase() == opsv1.PullPhase_PULL_WAITING {
		return report.Shorten(n.op.GetMessage())
	}
	return report.Shorten(n.lastFailure)
}

// setLimitKept says on how many nodes the speed limit is not kept, and why on one of them.
func (nodes nodeStates) setLimitKept(s *v1beta1.ImagePullJobStatus) {
	count, example := 0, ""
	for _, n := range nodes {
		if why := pull.LimitNotKept(n.op); why != "" {
			if count++; count == 1 {
				example = fmt.Sprintf("node %s: %s", n.name(), report.Shorten(why))
			}
		}
	}
	if count == 0 {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionSpeedLimitKept)
		return
	}
	report.SetCondition(s, v1beta1.ConditionSpeedLimitKept, false, limitNotKept,
		fmt.Sprintf("%s as fast as it can, %s", counted(count, "node pulls", "nodes pull"), example))
}
