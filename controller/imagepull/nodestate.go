// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/command"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/pull"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

// phase is how far a node is.
type phase int

const (
	// unknown has to be probed.
	unknown phase = iota
	// pending waits until fewer nodes pull than may.
	pending
	// active pulls, or is about to.
	active
	succeeded
	failed
	phases // their number
)

// nodeState is what is known of a node of a job.
type nodeState struct {
	target spec.Target
	phase  phase
	// order is the node's place in the order of the job, from 1.
	order int64
	// pullKey and alarmKey are the keys of the node in the schedule; 0 if it is not there.
	pullKey, alarmKey int64
	// call is the call to the node that is under way; nil if none is. quiet is closed when the last
	// call has ended; nil if there was none.
	call  *call
	quiet <-chan struct{}
	// unverified says that the node may be pulling though it is not active. No pull begins anywhere
	// before the node has been probed.
	unverified bool
	// lingering says that the node may be pulling though it is not active: the job was changed, or
	// the answer to the command is missing. It counts as pulling until a probe has been answered,
	// or the node has been silent for silenceTimeout.
	lingering bool
	// adopted says that the node pulled already when the call to it began.
	adopted bool
	// staleFailures says that the failures which the node reports are from before the job began
	// again.
	staleFailures bool
	// away is why the node cannot be commanded, since when, and how often that was tried.
	away  command.Trouble
	since time.Time
	tries int
	// untaken says that the node answered and did not take the command.
	untaken bool
	// retryAt is when to look at the node again.
	retryAt time.Time
	round   int
	// verifying says that the node had the image, and pulls to make sure that it still has.
	verifying bool
	// lastFailure is why the last attempt failed, while the node tries again.
	lastFailure string

	op       *opsv1.PullOperation
	begun    time.Time
	fraction float64
	// reason and message are why the node failed.
	reason, message string
	retries         int
}

func (n *nodeState) name() string { return n.target.Node.Name }

// done says that the job need not wait for the node.
func (n *nodeState) done() bool { return n.phase == succeeded || n.phase == failed || n.verifying }

// mayPull says that the node pulls, or may be pulling, for the job.
func (n *nodeState) mayPull() bool { return n.phase == active || n.lingering }

// unit is how much of the node's work is done, from 0 to 1.
func (n *nodeState) unit() float64 {
	if n.done() {
		return 1
	}
	return n.fraction
}

// gaveUp says that the node's pull failed, and not the commands to the node.
func (n *nodeState) gaveUp() bool { return n.phase == failed && n.away.Reason == "" }

// reached notes that the node can be commanded.
func (n *nodeState) reached() {
	n.away, n.since, n.tries, n.untaken = command.Trouble{}, time.Time{}, 0, false
}

// answered notes that the node has answered a probe. A node that did not take a command has to do
// that before it counts as reached.
func (n *nodeState) answered() {
	if n.away = (command.Trouble{}); !n.untaken {
		n.reached()
	}
}

// standing says how far a node is that is not done.
func (n *nodeState) standing() string {
	switch {
	case n.away.Reason != "":
		return n.away.Reason + ": " + n.away.Message
	case n.phase != active:
		return "its turn had not come"
	}
	text := "it was " + pull.PhaseName(n.op.GetPhase())
	if n.fraction > 0 {
		text += fmt.Sprintf(", %.0f %% of the image there", 100*n.fraction)
	}
	for _, more := range []string{n.op.GetReason(), n.op.GetMessage()} {
		if more != "" {
			text += ": " + more
		}
	}
	return text
}
