// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import "fmt"

// Status is how bad a finding is.
type Status string

// The statuses.
const (
	OK   Status = "ok"
	Warn Status = "warn" // works, and is not as it should be, or cannot be told
	Fail Status = "fail" // does not work
)

// Finding is the result of one check.
type Finding struct {
	// Check names the check: config, sockets, link, daemon and so on.
	Check  string `json:"check" yaml:"check"`
	Status Status `json:"status" yaml:"status"`
	// Detail says what was found, in a sentence or less.
	Detail string `json:"detail" yaml:"detail"`
	// Hint says what to do. Empty: nothing.
	Hint string `json:"hint,omitempty" yaml:"hint,omitempty"`
}

// report collects findings.
type report struct{ findings []Finding }

func (r *report) ok(check, format string, args ...any) {
	r.findings = append(r.findings, Finding{check, OK, fmt.Sprintf(format, args...), ""})
}

func (r *report) warn(check, hint, format string, args ...any) {
	r.findings = append(r.findings, Finding{check, Warn, fmt.Sprintf(format, args...), hint})
}

func (r *report) fail(check, hint, format string, args ...any) {
	r.findings = append(r.findings, Finding{check, Fail, fmt.Sprintf(format, args...), hint})
}

// Failed counts the findings with status Fail.
func Failed(findings []Finding) int {
	n := 0
	for _, f := range findings {
		if f.Status == Fail {
			n++
		}
	}
	return n
}
