// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

const (
	// maxNodesOfReason is how many nodes the status names beside a reason: more than anybody reads, and enough for a program that sees to
	// them in rounds. failedNodes has more of them, without their reasons.
	maxNodesOfReason = 100
	// maxNamed is how many nodes of a reason a message names.
	maxNamed = 3
)

// failures are those of the nodes that have given up. The caller holds the mutex.
func (u *run) failures() []v1beta1.NodePullFailure {
	var list []v1beta1.NodePullFailure
	for _, m := range u.members {
		if m.phase == failed && !m.held {
			list = append(list, v1beta1.NodePullFailure{Node: m.target.node.Name, Reason: m.reason, Message: shorten(m.message)})
		}
	}
	return list
}

// tellFailures says in the status which nodes failed, and why. It sorts list.
func tellFailures(s *v1beta1.ImagePullJobStatus, list []v1beta1.NodePullFailure) {
	s.FailedNodes, s.Failures, s.FailureReasons = nil, nil, nil
	byName := func(a, b v1beta1.NodePullFailure) int { return strings.Compare(a.Node, b.Node) }
	slices.SortFunc(list, byName)
	of := map[string][]v1beta1.NodePullFailure{}
	for _, f := range list {
		if len(s.FailedNodes) < maxFailedNodes {
			s.FailedNodes = append(s.FailedNodes, f.Node)
		}
		of[f.Reason] = append(of[f.Reason], f)
	}
	for reason, all := range of {
		c := v1beta1.FailureCount{Reason: reason, Count: int32(len(all))}
		for _, f := range first(all, maxNodesOfReason) {
			c.Nodes = append(c.Nodes, f.Node)
		}
		s.FailureReasons = append(s.FailureReasons, c)
	}
	slices.SortFunc(s.FailureReasons, func(a, b v1beta1.FailureCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Reason, b.Reason))
	})
	// Of each reason in turn, so that one which is rare is among them.
	for i := 0; len(s.Failures) < min(len(list), maxDetails); i++ {
		for _, c := range s.FailureReasons {
			if all := of[c.Reason]; i < len(all) && len(s.Failures) < maxDetails {
				s.Failures = append(s.Failures, all[i])
			}
		}
	}
	slices.SortFunc(s.Failures, byName)
}

// tellUnfinished adds to the status of a job that its deadline has ended the nodes that were not done, and how far they were. The caller
// holds the mutex.
func (u *run) tellUnfinished(s *v1beta1.ImagePullJobStatus) {
	list := u.failures()
	for _, m := range u.members {
		if !m.done() {
			list = append(list, v1beta1.NodePullFailure{Node: m.target.node.Name, Reason: completeDeadline, Message: shorten(m.standing())})
		}
	}
	if len(list) == 0 {
		return
	}
	tellFailures(s, list)
	for _, kind := range []string{v1beta1.ConditionComplete, v1beta1.ConditionSucceeded} {
		if c := meta.FindStatusCondition(s.Conditions, kind); c != nil {
			setCondition(s, kind, c.Status == metav1.ConditionTrue, c.Reason, c.Message+": "+reasonsText(s))
		}
	}
}

// standing says where a node is that is not done.
func (m *member) standing() string {
	switch {
	case m.away.reason != "":
		return m.away.reason + ": " + m.away.message
	case m.phase != active:
		return "its turn had not come"
	}
	text := "it was " + phaseName(m.op.GetPhase())
	if m.fraction > 0 {
		text += fmt.Sprintf(", %.0f %% of the image there", 100*m.fraction)
	}
	for _, more := range []string{m.op.GetReason(), m.op.GetMessage()} {
		if more != "" {
			text += ": " + more
		}
	}
	return text
}

// reasonsText says which nodes failed for which reasons, the most frequent first, with what one of them says.
func reasonsText(s *v1beta1.ImagePullJobStatus) string {
	var parts []string
	for _, r := range first(s.FailureReasons, maxSlowest) {
		text := fmt.Sprintf("%s on %d", r.Reason, r.Count)
		if names := first(r.Nodes, maxNamed); len(names) > 0 {
			text += " (" + strings.Join(names, ", ")
			if left := int(r.Count) - len(names); left > 0 {
				text += fmt.Sprintf(" and %d more", left)
			}
			text += ")"
		}
		if i := slices.IndexFunc(s.Failures, func(f v1beta1.NodePullFailure) bool { return f.Reason == r.Reason }); i >= 0 && s.Failures[i].Message != "" {
			text += ": " + s.Failures[i].Message
		}
		parts = append(parts, text)
	}
	if left := len(s.FailureReasons) - len(parts); left > 0 {
		parts = append(parts, fmt.Sprintf("%d more reasons, see failureReasons", left))
	}
	return strings.Join(parts, "; ")
}
