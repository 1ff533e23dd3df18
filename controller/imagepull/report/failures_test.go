// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package report_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
)

// failuresOf are count nodes for each reason, the names of which begin with the reason's.
func failuresOf(counts map[string]int) []v1beta1.NodePullFailure {
	var list []v1beta1.NodePullFailure
	for reason, count := range counts {
		for i := range count {
			list = append(list, v1beta1.NodePullFailure{Node: fmt.Sprintf("%s-%04d", strings.ToLower(reason), i),
				Reason:  reason,
				Message: "says " + reason})
		}
	}
	return list
}

// A status names the nodes of every reason, however many there are of another one, and does not
// grow without end.
func TestSetFailures(t *testing.T) {
	s := &v1beta1.ImagePullJobStatus{}
	report.SetFailures(s, failuresOf(map[string]int{"NotFound": 3000, "Rare": 1, "DiskPressure": 4}))
	if len(s.FailedNodes) != 2000 || !slices.IsSorted(s.FailedNodes) {
		t.Errorf("%d failedNodes", len(s.FailedNodes))
	}
	var reasons []string
	for _, r := range s.FailureReasons {
		reasons = append(reasons, fmt.Sprintf("%s %d %d %s", r.Reason, r.Count, len(r.Nodes), r.Nodes[0]))
	}
	if got, want := strings.Join(reasons, ", "),
		"NotFound 3000 100 notfound-0000, DiskPressure 4 4 diskpressure-0000, Rare 1 1 rare-0000"; got != want {
		t.Errorf("reasons %s, want %s", got, want)
	}
	examples := map[string]int{}
	for _, f := range s.Failures {
		examples[f.Reason]++
	}
	if len(s.Failures) != 20 || examples["Rare"] != 1 || examples["DiskPressure"] != 4 {
		t.Errorf("failures %v", examples)
	}
	want := "NotFound on 3000 (notfound-0000, notfound-0001, notfound-0002 and 2997 more): says NotFound; " +
		"DiskPressure on 4 (diskpressure-0000, diskpressure-0001, diskpressure-0002 and 1 more): says " +
		"DiskPressure; Rare " +
		"on 1 (rare-0000): says Rare"
	if got := report.Reasons(s); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if report.SetFailures(s, nil); len(s.FailedNodes)+len(s.Failures)+len(s.FailureReasons) != 0 ||
		report.Reasons(s) != "" {
		t.Errorf("nothing has failed: %+v", s)
	}
}

func TestReasonsAreBounded(t *testing.T) {
	counts := map[string]int{}
	for i := range 8 {
		counts[fmt.Sprintf("Reason%d", i)] = i + 1
	}
	s := &v1beta1.ImagePullJobStatus{}
	report.SetFailures(s, failuresOf(counts))
	if got := report.Reasons(s); !strings.HasSuffix(got, "; 3 more reasons, see failureReasons") ||
		strings.Count(got, ";") != 5 {
		t.Error(got)
	}
	// One that a controller of an earlier version has written.
	s = &v1beta1.ImagePullJobStatus{FailureReasons: []v1beta1.FailureCount{{Reason: "NotFound", Count: 2}}}
	if got := report.Reasons(s); got != "NotFound on 2" {
		t.Error(got)
	}
}
