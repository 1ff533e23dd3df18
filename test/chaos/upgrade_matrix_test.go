// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"slices"

	"github.com/cri-proxy/cri-proxy/test/chaos/invariant"
)

// Orders of the cases that are rollouts of an image to one pod.
const (
	upStopFirst  = "UpgradeStopFirst"
	upStartFirst = "UpgradeStartFirst"
	// upBroken is StopFirst to an image whose process ends at once, upBrokenBeside the same with
	// StartFirst.
	upBroken       = "UpgradeBroken"
	upBrokenBeside = "UpgradeBrokenBeside"
	// upBack is the way back from an image that does not get ready: the step is that of the second
	// upgrade.
	upBack = "UpgradeBack"
)

// Faults beside those of restarts.
const (
	killController = "kill-controller" // kill -9; the node goes on for a moment, then the controller is started again
	// kill -9 of controller, kubelet and proxy, which are started again in that order.
	killAll = "kill-all"
)

// The steps at which the node can be caught in an upgrade. Two are the controller's alone: at asked
// it has just been told, at complete it says that the rollout has ended.
var (
	upStopFirstPoints = []string{
		"asked", "pulling", "stage", "created", "held", "arm", "gated", "armed", "stop", "stopped", "running",
		"started", "reveal", "revealed", "adopt", "done", "complete",
	}
	upStartFirstPoints = []string{
		"asked", "pulling", "stage", "created", "held", "start", "running", "ready", "armed", "stop", "stopped",
		"started", "reveal", "revealed", "adopt", "done", "complete",
	}
	upBrokenPoints       = []string{"armed", "running", "started", "revealed", "adopt", "done"}
	upBrokenBesidePoints = []string{"start", "running", "undo", "done"}
	upBackPoints         = []string{"held", "armed", "stop", "revealed", "adopt", "done"}
)

// controllers are the steps that only the controller knows.
var controllers = []string{"asked", "complete"}

// upMore are the faults of UpgradeStopFirst that say most at certain steps.
var upMore = map[string][]string{
	killAll:      {"held", "armed", "stop", "stopped", "revealed", "adopt"},
	runtimeHangs: {"stage", "arm", "stop", "adopt"},
	lateKill:     {"stage", "arm", "stop", "stopped"},
	runtimeError: {"stage", "arm", "stop", "stopped"},
	answerLost:   {"stage", "arm", "stop", "stopped"},
}

// upReduced are those of every day.
var upReduced = []string{
	"UpgradeStopFirst/gate/armed/kill-controller",
	"UpgradeStopFirst/gate/revealed/restart-kubelet",
	"UpgradeStartFirst/overlap/ready/kill-proxy",
	"UpgradeBroken/gate/adopt/kill-controller",
	"UpgradeStopFirst/gate/armed/journal-deleted",
}

// upPatient is a case in which a call of kubelet is cut off and not repeated, that waits for the
// node to find out. Others do not: it takes two minutes, and harms nobody but the next operation on
// the slot.
var upPatient = []string{"UpgradeStopFirst/gate/running/kill-proxy"}

// upgrades returns every case that is a rollout.
func upgrades() []chaosCase {
	var all []chaosCase
	add := func(order, method, point, fault string) {
		c := chaosCase{order: order, method: method, point: point, fault: fault, upgrade: true,
			want: expectUpgrade(order, point, fault)}
		c.reduced, c.patient = slices.Contains(upReduced, c.name()), slices.Contains(upPatient, c.name())
		all = append(all, c)
	}
	for _, o := range []struct {
		order, method string
		points        []string
		faults        []string
	}{
		{upStopFirst, gate, upStopFirstPoints,
			[]string{killProxy, killTwice, killController, restartKubelet, killContainerd, loseJournal, ruinJournal}},
		{upStartFirst, overlap, upStartFirstPoints, []string{killProxy, killController, restartKubelet, killContainerd,
			loseJournal}},
		{upBroken, gate, upBrokenPoints, []string{killProxy, killController, restartKubelet}},
		{upBrokenBeside, overlap, upBrokenBesidePoints, []string{killProxy, killController, restartKubelet}},
		{upBack, gate, upBackPoints, []string{killProxy, killController, restartKubelet}},
	} {
		for _, point := range o.points {
			for _, fault := range o.faults {
				switch {
				case slices.Contains(controllers, point) && fault != killController, fault == killTwice &&
					point == "done":
				default:
					add(o.order, o.method, point, fault)
				}
			}
			for _, fault := range []string{killAll, runtimeHangs, lateKill, runtimeError, answerLost} {
				if o.order == upStopFirst && slices.Contains(upMore[fault], point) {
					add(o.order, o.method, point, fault)
				}
			}
		}
	}
	for _, method := range []string{pidfd, plain} {
		for _, point := range []string{"armed", "stop", "stopped", "running"} {
			for _, fault := range []string{killProxy, restartKubelet} {
				add(upStopFirst, method, point, fault)
			}
		}
	}
	return all
}

// expectUpgrade says how a rollout that meets the fault at the step may end.
func expectUpgrade(order, point, fault string) invariant.Expect {
	e := invariant.Expect{Outcome: invariant.Succeeds, Overlap: order == upStartFirst || order == upBrokenBeside,
		Lost: slices.Contains(losses, fault)}
	switch {
	case e.Lost:
		e.Outcome = invariant.Either // the controller asks again, or goes back
	case order == upBroken, order == upBack:
		e.Outcome = invariant.Fails
	case order == upBrokenBeside:
		e.Outcome, e.Untouched = invariant.Fails, true
	case slices.Contains([]string{lateKill, runtimeError, answerLost}, fault):
		// What fails before the patch is taken back by the controller, or tried again; after it
		// kubelet makes the container.
		e.Outcome = invariant.Either
		e.Untouched = point == "stage" || point == "arm"
	}
	return e
}
