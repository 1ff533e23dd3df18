// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"fmt"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Outcome ends the operation on a container. It is an error, except that it also carries success.
type Outcome struct {
	Phase opsv1.Phase
	// Reason is one of the reasons of package opsv1; empty for success.
	Reason  string
	Message string
}

func (o *Outcome) Error() string { return o.Message }

// Failf returns the outcome of a container whose operation has failed.
func Failf(reason, format string, args ...any) *Outcome {
	return &Outcome{Phase: opsv1.Phase_PHASE_FAILED, Reason: reason, Message: fmt.Sprintf(format, args...)}
}
