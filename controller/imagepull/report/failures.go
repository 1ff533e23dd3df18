// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package report

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
	// MaxDetails is how many nodes, secrets or reasons the status describes one by one.
	MaxDetails = 20

	maxFailedNodes = 2000
	// maxReasons is how many reasons a message names.
	maxReasons = 5
	// maxNodesOfReason is how many nodes the status names beside a reason: more than anybody reads,
	// and enough for a program that repairs them in rounds. failedNodes has more of them, without
	// their reasons.
	maxNodesOfReason = 100
	// maxNamed is how many nodes of a reason a message names.
	maxNamed = 3
)

// SetFailures sets which nodes failed, and why. It sorts list.
func SetFailures(s *v1beta1.ImagePullJobStatus, list []v1beta1.NodePullFailure) {
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
		for _, f := range First(all, maxNodesOfReason) {
			c.Nodes = append(c.Nodes, f.Node)
		}
		s.FailureReasons = append(s.FailureReasons, c)
	}
	slices.SortFunc(s.FailureReasons, func(a, b v1beta1.FailureCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Reason, b.Reason))
	})
	// Take one of each reason, again and again, so that a rare reason is among them.
	for i := 0; len(s.Failures) < min(len(list), MaxDetails); i++ {
		for _, c := range s.FailureReasons {
			if all := of[c.Reason]; i < len(all) && len(s.Failures) < MaxDetails {
				s.Failures = append(s.Failures, all[i])
			}
		}
	}
	slices.SortFunc(s.Failures, byName)
}

// SetLateFailures sets in the status of a job that has ended which nodes failed, and has the
// conditions say so. The list holds the nodes, too, that were not done at the job's deadline.
func SetLateFailures(s *v1beta1.ImagePullJobStatus, list []v1beta1.NodePullFailure) {
	if len(list) == 0 {
		return
	}
	SetFailures(s, list)
	for _, kind := range []string{v1beta1.ConditionComplete, v1beta1.ConditionSucceeded} {
		if c := meta.FindStatusCondition(s.Conditions, kind); c != nil {
			SetCondition(s, kind, c.Status == metav1.ConditionTrue, c.Reason, c.Message+": "+Reasons(s))
		}
	}
}

// Reasons says which nodes failed for which reasons, the most frequent reason first, with the
// message of one node.
func Reasons(s *v1beta1.ImagePullJobStatus) string {
	var parts []string
	for _, r := range First(s.FailureReasons, maxReasons) {
		text := fmt.Sprintf("%s on %d", r.Reason, r.Count)
		if names := First(r.Nodes, maxNamed); len(names) > 0 {
			text += " (" + strings.Join(names, ", ")
			if left := int(r.Count) - len(names); left > 0 {
				text += fmt.Sprintf(" and %d more", left)
			}
			text += ")"
		}
		i := slices.IndexFunc(s.Failures, func(f v1beta1.NodePullFailure) bool { return f.Reason == r.Reason })
		if i >= 0 && s.Failures[i].Message != "" {
			text += ": " + s.Failures[i].Message
		}
		parts = append(parts, text)
	}
	if left := len(s.FailureReasons) - len(parts); left > 0 {
		parts = append(parts, fmt.Sprintf("%d more reasons, see failureReasons", left))
	}
	return strings.Join(parts, "; ")
}
