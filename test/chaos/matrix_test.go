// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"slices"
	"strings"

	"github.com/cri-proxy/cri-proxy/test/chaos/invariant"
)

// Orders of a restart.
const (
	stopFirst  = "StopFirst"
	startFirst = "StartFirst"
)

// Methods of a restart. StartFirst has one only.
const (
	gate    = "gate"
	pidfd   = "pidfd"
	plain   = "plain"
	overlap = "overlap"
)

// Faults. Each strikes while the restart waits at a step, unless it says otherwise.
const (
	killProxy      = "kill-proxy"       // kill -9 at the step; the next process takes over
	killTwice      = "kill-proxy-twice" // the next process is killed as well, one step later
	killContainerd = "kill-containerd"  // kill -9; the restart goes on, then containerd comes back
	// kill -9 of containerd a moment after the restart went on: in the middle of a call.
	lateKill       = "kill-in-the-call"
	restartKubelet = "restart-kubelet" // kill -9; the new kubelet has seen the node before the restart goes on
	runtimeHangs   = "runtime-hangs"   // SIGSTOP for three seconds
	runtimeError   = "runtime-error"   // the next call that changes a container of the slot fails, without effect
	runtimeErrors  = "runtime-errors"  // the next three do
	answerLost     = "answer-lost"     // the next one takes effect and fails all the same
	// the journal's disk is full until the restart has ended; then the proxy is restarted.
	diskFull     = "disk-full"
	diskFullKill = "disk-full-kill"  // the same, and the proxy is killed and started while it is full
	loseJournal  = "journal-deleted" // kill -9 at the step, and the journal is gone when the next process starts
	ruinJournal  = "journal-ruined"  // the same, and in its place there is something else
)

// losses are the faults after which the node does not know the operation any more.
var losses = []string{loseJournal, ruinJournal}

// chaosCase is one cell of the matrix.
type chaosCase struct {
	order, method, point, fault string
	want                        invariant.Expect
	// upgrade: an InPlaceRollout gives the slot another image.
	upgrade bool
	// patient cases wait until the node knows that kubelet does not come any more.
	patient bool
	// byRequest: a ContainerRecreateRequest asks for the restart, by way of the controller, instead
	// of a command.
	byRequest bool
	// reduced cases run in every go test.
	reduced bool
}

func (c chaosCase) name() string {
	parts := []string{c.order, c.method, c.point, c.fault}
	if c.byRequest {
		parts = append(parts, "by-request")
	}
	return strings.Join(parts, "/")
}

// The steps at which a restart can be caught, in the order in which it comes to them. undo stands
// for a restart that fails: the runtime is made to refuse to stop the incumbent (StopFirst) or to
// start the successor (StartFirst).
var (
	stopFirstPoints = []string{"stage", "created", "staged", "stop", "gated", "stopped", "running", "started",
		"reveal", "revealed", "done", "undo"}
	startFirstPoints = []string{"stage", "created", "staged", "start", "running", "ready", "stop", "stopped", "reveal",
		"revealed", "done", "undo"}
)

// faultsEverywhere strike at every step of StopFirst with method gate and of StartFirst.
var faultsEverywhere = []string{killProxy, killContainerd, restartKubelet, runtimeHangs, runtimeError, diskFull,
	loseJournal, ruinJournal}

// more are the faults that say most at certain steps.
var more = map[string]map[string][]string{
	stopFirst: {
		killTwice:     {"stage", "created", "staged", "stop", "gated", "stopped", "running", "started", "reveal"},
		lateKill:      {"stage", "stop", "gated", "stopped"},
		runtimeErrors: {"stage", "staged", "stop", "stopped"},
		answerLost:    {"stage", "staged", "stop", "gated", "stopped"},
		diskFullKill:  {"stage", "staged", "gated", "stopped", "reveal", "done"},
	},
	startFirst: {
		killTwice:     {"stage", "created", "staged", "start", "running", "ready", "stop", "stopped", "reveal"},
		lateKill:      {"stage", "start", "ready"},
		runtimeErrors: {"stage", "start", "ready"},
		answerLost:    {"stage", "start", "ready"},
		diskFullKill:  {"stage", "start", "ready", "reveal", "done"},
	},
}

// slower are the cases of the other methods: what differs from gate is how the successor is
// started, so the steps around that.
var slower = map[string][]string{
	killProxy:      {"stage", "created", "staged", "stop", "stopped", "running", "started", "reveal", "done"},
	killContainerd: {"stop", "stopped", "running"},
	lateKill:       {"stop", "stopped"},
	restartKubelet: {"stopped"},
	runtimeHangs:   {"stop", "stopped"},
	runtimeError:   {"stop", "stopped"},
	runtimeErrors:  {"stopped"},
	answerLost:     {"stop", "stopped"},
	diskFull:       {"stopped"},
	loseJournal:    {"created", "stop", "stopped", "running"},
	ruinJournal:    {"staged", "stopped"},
}

// byRequest are the cases that are run once more with a request in place of a command.
var byRequest = []string{
	"StopFirst/gate/stage/kill-proxy",
	"StopFirst/gate/gated/kill-proxy",
	"StopFirst/gate/stopped/kill-containerd",
	"StopFirst/gate/stopped/restart-kubelet",
	"StopFirst/gate/staged/disk-full",
	"StopFirst/gate/undo/kill-proxy",
	"StopFirst/pidfd/stopped/kill-proxy",
	"StartFirst/overlap/start/kill-proxy",
	"StartFirst/overlap/ready/kill-containerd",
	"StartFirst/overlap/undo/runtime-hangs",
}

// reduced is the selection for every day: each fault, each order, and the steps that have the most
// to lose.
var reduced = []string{
	"StopFirst/gate/created/kill-proxy",
	"StopFirst/gate/gated/kill-proxy",
	"StopFirst/gate/stopped/kill-proxy",
	"StopFirst/gate/reveal/kill-proxy",
	"StopFirst/gate/gated/kill-containerd",
	"StopFirst/gate/gated/restart-kubelet",
	"StopFirst/gate/stop/runtime-hangs",
	"StopFirst/gate/undo/kill-proxy",
	"StopFirst/gate/staged/disk-full",
	"StopFirst/pidfd/stopped/kill-containerd",
	"StopFirst/plain/stopped/runtime-error",
	"StartFirst/overlap/start/kill-proxy",
	"StartFirst/overlap/ready/kill-containerd",
	"StartFirst/overlap/start/runtime-errors",
	"StopFirst/gate/created/journal-deleted",
	"StopFirst/gate/gated/journal-ruined",
	"StopFirst/gate/stopped/journal-deleted",
	"StartFirst/overlap/ready/journal-ruined",
}

// matrix returns every case.
func matrix() []chaosCase {
	var all []chaosCase
	add := func(order, method, point, fault string) {
		c := chaosCase{order: order, method: method, point: point, fault: fault,
			want: expect(order, method, point, fault)}
		again := c
		again.byRequest = slices.Contains(byRequest, c.name())
		c.reduced = slices.Contains(reduced, c.name())
		all = append(all, c)
		if again.byRequest {
			all = append(all, again)
		}
	}
	for _, o := range []struct {
		order, method string
		points        []string
	}{{stopFirst, gate, stopFirstPoints}, {startFirst, overlap, startFirstPoints}} {
		for _, point := range o.points {
			for _, fault := range faultsEverywhere {
				add(o.order, o.method, point, fault)
			}
			for _, fault := range []string{killTwice, lateKill, runtimeErrors, answerLost, diskFullKill} {
				if slices.Contains(more[o.order][fault], point) {
					add(o.order, o.method, point, fault)
				}
			}
		}
	}
	for _, method := range []string{pidfd, plain} {
		for _, point := range stopFirstPoints {
			for _, fault := range append(slices.Clone(faultsEverywhere), lateKill, runtimeErrors, answerLost) {
				if slices.Contains(slower[fault], point) {
					add(stopFirst, method, point, fault)
				}
			}
		}
	}
	return append(all, upgrades()...)
}

// expect says how a restart that meets the fault at the step may end.
func expect(order, method, point, fault string) invariant.Expect {
	e := invariant.Expect{Overlap: order == startFirst, Lost: slices.Contains(losses, fault)}
	points := stopFirstPoints
	if order == startFirst {
		points = startFirstPoints
	}
	at := slices.Index(points, point)
	// Until then nothing that serves has been touched.
	before := func(p string) bool { return at < slices.Index(points, p) }
	stops := "stopped"
	switch {
	case e.Lost:
		return e
	case point == "undo":
		// It fails because the test made it fail, and the incumbent has not been stopped.
		e.Outcome, e.Untouched = invariant.Fails, true
		return e
	}
	switch fault {
	case killProxy, killTwice, killContainerd, restartKubelet, runtimeHangs:
		e.Outcome = invariant.Succeeds
	case lateKill:
		// A create that is cut off fails the restart: it may have taken effect, and nothing has
		// been stopped.
		e.Outcome = invariant.Succeeds
		if point == "stage" {
			e.Outcome, e.Untouched = invariant.Either, true
		}
	case runtimeError, runtimeErrors:
		switch {
		case point == "stage" && method == gate && fault == runtimeError:
			e.Outcome = invariant.Succeeds // the next try is one without a gate
		case point == "stage":
			e.Outcome, e.Untouched = invariant.Fails, true
		case before(stops):
			// The stop, or the start behind the gate or beside the incumbent, is refused.
			e.Outcome, e.Untouched = invariant.Either, true
		case fault == runtimeErrors && point == "stopped" && method != gate && method != overlap:
			e.Outcome = invariant.Fails // neither the first nor the second start works: kubelet's policy decides
		default:
			e.Outcome = invariant.Succeeds // once more from a fresh container, or nothing left that could fail
		}
	case answerLost:
		e.Outcome = invariant.Either
		e.Untouched = point == "stage"
	case diskFull, diskFullKill:
		switch {
		case before("stop") && fault == diskFull:
			e.Outcome, e.Untouched = invariant.Fails, true
		case before(stops):
			e.Outcome = invariant.Either
		default:
			e.Outcome = invariant.Succeeds
		}
	}
	return e
}
