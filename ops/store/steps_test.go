// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/store"
)

var allSteps = []store.Step{
	store.StepNone, store.StepStage, store.StepStaged, store.StepHeld, store.StepStart, store.StepArm, store.StepArmed,
	store.StepStop, store.StepAsk, store.StepStarted, store.StepReveal, store.StepUndo, store.StepDone,
}

// facts are what a record says of its container.
type facts struct {
	HoldsSlot, PastPointOfNoReturn, Hidden, Masked, Driven, Joinable, SuccessorMayRun, Unleavable bool
}

// factsBefore has the formulas that the engine had in eight places before there was a table of
// steps.
func factsBefore(c store.Container, upgrade bool) facts {
	var f facts
	switch c.Step { // handover.go
	case store.StepStop, store.StepStarted, store.StepUndo:
		f.Unleavable = true
	}
	switch c.Step { // join.go
	case store.StepStaged, store.StepStart:
		f.Joinable = !c.StopBy.IsZero()
	case store.StepStop, store.StepStarted:
		f.Joinable = true
	case store.StepReveal:
		f.Joinable = c.Joined
	}
	if c.Step == store.StepNone || c.Step == store.StepDone { // newimage.go and engine.go
		return f
	}
	f.HoldsSlot = true
	f.PastPointOfNoReturn = !c.StopBy.IsZero() || c.Step == store.StepStop || c.Step == store.StepAsk ||
		c.Step == store.StepStarted || c.Step == store.StepReveal
	f.Driven = upgrade && c.Step != store.StepStage && c.Step != store.StepUndo || !upgrade && f.Joinable
	f.SuccessorMayRun = c.Step != store.StepStage && c.Step != store.StepStaged && c.Step != store.StepHeld // undo.go
	if c.Step == store.StepReveal {
		return f
	}
	f.Hidden = true
	f.Masked = c.Step != store.StepStage &&
		(!upgrade || c.Step == store.StepStop || c.Step == store.StepAsk || c.Step == store.StepStarted)
	return f
}

// The table of steps says what the formulas before it said, for every step and everything that the
// formulas looked at.
func TestStepFacts(t *testing.T) {
	for _, step := range allSteps {
		for i := range 8 {
			upgrade, joined := i&1 != 0, i&2 != 0
			c := store.Container{Step: step, Joined: joined}
			if i&4 != 0 {
				c.StopBy = time.Unix(1, 0)
			}
			got := facts{
				HoldsSlot: c.HoldsSlot(), PastPointOfNoReturn: c.PastPointOfNoReturn(), Hidden: c.Hidden(),
				Masked: c.Masked(upgrade), Driven: c.Driven(upgrade), Joinable: c.Joinable(),
				SuccessorMayRun: c.SuccessorMayRun(), Unleavable: c.Unleavable(),
			}
			if want := factsBefore(c, upgrade); got != want {
				name := fmt.Sprintf("%q, upgrade %t, joined %t, stopBy %s", step, upgrade, joined, c.StopBy)
				t.Errorf("%s:\ngot  %+v\nwant %+v", name, got, want)
			}
		}
	}
}
