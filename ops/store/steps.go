// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store

// Step is how far one container of an operation has come, as the journal knows it. A step is
// written before what it names is done: a process that dies may or may not have done it.
type Step string

// The steps, in order. An operation writes only some of them.
const (
	StepNone    Step = ""
	StepStage   Step = "stage"   // the successor is about to be created
	StepStaged  Step = "staged"  // it exists; the incumbent is about to be masked and its preStop run
	StepHeld    Step = "held"    // upgrade: the successor exists and waits for the commit
	StepStart   Step = "start"   // StartFirst: the successor is about to be started beside the incumbent
	StepArm     Step = "arm"     // upgrade: the successor is about to be started up to its gate, if it has one
	StepArmed   Step = "armed"   // upgrade: the successor is ready and waits for kubelet to stop the incumbent
	StepStop    Step = "stop"    // the incumbent is about to be stopped and the successor started
	StepAsk     Step = "ask"     // upgrade: the incumbent is gone; the successor begins if kubelet asks for it
	StepStarted Step = "started" // the successor runs; postStart and reveal follow
	StepReveal  Step = "reveal"  // kubelet is about to be shown both containers, for good
	StepUndo    Step = "undo"    // the successor is about to be removed, or shown as failed
	StepDone    Step = "done"
)

// rule says when a fact of a step is true.
type rule int

const (
	never rule = iota
	always
	ifStopBy  // once StopBy is written, which is right after the point of no return
	ifJoined  // once a stop of kubelet's has joined the restart
	ifRestart // of a restart, not of an upgrade
)

// facts are what a step says of its container. The zero value is that of a container of which there
// is nothing on the node and that holds no slot.
type facts struct {
	// begun: the operation holds the container's slot.
	begun bool
	// noReturn: the incumbent is bound to be stopped, or has been. Nobody can cancel the operation.
	noReturn rule
	// hidden: kubelet is not shown the successor. Only the step reveal shows it, and for good.
	hidden bool
	// masked: kubelet is shown the incumbent as running, whatever has become of it.
	masked rule
	// restart and upgrade: kubelet's calls in the slot wait for the operation to answer them.
	restart, upgrade rule
	// runs: the successor may run. Until then it was never started.
	runs bool
	// busy: Run cannot leave the operation at once; see ops.Engine.Unleavable.
	busy bool
}

// table has the facts of each step that this binary knows.
var table = map[Step]facts{
	StepNone: {},
	// A crash leaves perhaps a successor, never started: it is removed and the step is done again.
	StepStage: {begun: true, hidden: true, noReturn: ifStopBy},
	// A crash leaves a successor that was never started.
	StepStaged: {begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, restart: ifStopBy, upgrade: always},
	StepHeld:   {begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, upgrade: always},
	// A crash leaves perhaps two containers that run.
	StepStart: {
		begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, restart: ifStopBy,
		upgrade: always, runs: true,
	},
	// A crash leaves perhaps a successor at its gate.
	StepArm:   {begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, upgrade: always, runs: true},
	StepArmed: {begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, upgrade: always, runs: true},
	// A crash leaves an incumbent that is perhaps gone.
	StepStop: {
		begun: true, hidden: true, noReturn: always, masked: always, restart: always, upgrade: always, runs: true,
		busy: true,
	},
	// The incumbent is gone.
	StepAsk: {begun: true, hidden: true, noReturn: always, masked: always, upgrade: always, runs: true},
	// The successor runs.
	StepStarted: {
		begun: true, hidden: true, noReturn: always, masked: always, restart: always, upgrade: always, runs: true,
		busy: true,
	},
	// Kubelet may have seen both: neither vanishes again.
	StepReveal: {begun: true, noReturn: always, restart: ifJoined, upgrade: always, runs: true},
	// A crash leaves a successor that has failed.
	StepUndo: {begun: true, hidden: true, noReturn: ifStopBy, masked: ifRestart, runs: true, busy: true},
	StepDone: {},
}

// holds reports whether the rule holds for the container of an upgrade or of a restart.
func (c *Container) holds(r rule, upgrade bool) bool {
	switch r {
	case always:
		return true
	case ifStopBy:
		return !c.StopBy.IsZero()
	case ifJoined:
		return c.Joined
	case ifRestart:
		return !upgrade
	default:
		return false
	}
}

// HoldsSlot reports whether the operation has the container's slot: it has begun with the container
// and has not ended.
func (c *Container) HoldsSlot() bool { return table[c.Step].begun }

// PastPointOfNoReturn reports whether the incumbent is bound to be stopped, or has been: the
// operation can no longer be cancelled.
func (c *Container) PastPointOfNoReturn() bool { return c.holds(table[c.Step].noReturn, false) }

// Hidden reports whether kubelet must not see the successor.
func (c *Container) Hidden() bool { return table[c.Step].hidden }

// Masked reports whether kubelet is shown the incumbent as running, whatever has become of it.
// After a reboot of the machine nothing is masked: all containers have ended.
func (c *Container) Masked(upgrade bool) bool { return c.holds(table[c.Step].masked, upgrade) }

// Driven reports whether calls of kubelet's in the slot wait for the operation to answer them. For
// a restart these are stops that join it, see [Container.Joinable].
func (c *Container) Driven(upgrade bool) bool {
	if upgrade {
		return c.holds(table[c.Step].upgrade, true)
	}
	return c.holds(table[c.Step].restart, false)
}

// Joinable reports whether a stop of kubelet's may join the restart: the incumbent is bound to be
// stopped, or has been.
func (c *Container) Joinable() bool { return c.Driven(false) }

// SuccessorMayRun reports whether the successor may have been started.
func (c *Container) SuccessorMayRun() bool { return table[c.Step].runs }

// Unleavable reports whether the process must not leave the operation at once: the container is
// being stopped, or its successor is about to be started or removed.
func (c *Container) Unleavable() bool { return table[c.Step].busy }
