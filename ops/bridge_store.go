// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// The names of packages store and operation as this package has always called them. They go with
// the split of restart into packages.

type (
	step            = store.Step
	containerRecord = store.Container
	outcome         = operation.Outcome
)

const (
	stepNone    = store.StepNone
	stepStage   = store.StepStage
	stepStaged  = store.StepStaged
	stepHeld    = store.StepHeld
	stepStart   = store.StepStart
	stepArm     = store.StepArm
	stepArmed   = store.StepArmed
	stepStop    = store.StepStop
	stepAsk     = store.StepAsk
	stepStarted = store.StepStarted
	stepReveal  = store.StepReveal
	stepUndo    = store.StepUndo
	stepDone    = store.StepDone
)

func failf(reason, format string, args ...any) *outcome {
	return operation.Failf(reason, format, args...)
}
