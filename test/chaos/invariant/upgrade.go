// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package invariant

import (
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Reasons for which a rollout ends (api/inplace/v1alpha1).
const (
	RolledOut  = "RolledOut"
	RolledBack = "RolledBack"
)

// CheckUpgrade is [Check] for the rollout of an image to one pod. It succeeds when the pod has the
// new image, and fails when it has been rolled back. How often a node was asked for it is left to
// the controller.
func CheckUpgrade(before, after *Facts, want Expect) []string {
	c := &check{before: before, after: after, want: want}
	c.slot()
	c.pod()
	c.leaks()
	c.application()
	c.neighbours()
	c.held()
	c.once()
	c.rollout()
	return c.bad
}

// held: nothing on the node waits for the rollout, or is kept for it. All is done but kubelet's
// part once an operation waits for kubelet to adopt the container.
func (c *check) held() {
	if len(c.after.Active) > 0 {
		c.add("operations go on: %q", c.after.Active)
	}
	if len(c.after.Pins) > 0 {
		c.add("images are pinned: %q", c.after.Pins)
	}
	if op := c.after.Operation; op != nil && op.GetFinishTime() == nil && op.GetPhase() != opsv1.Phase_PHASE_ADOPTING {
		c.add("the operation has not ended: %v", op)
	}
}

// once: each attempt is one container, and kubelet asked for it once.
func (c *check) once() {
	is, made := map[uint32]bool{}, map[uint32]bool{}
	for _, x := range c.after.Runtime {
		if is[x.Attempt] {
			c.add("two containers are attempt %d: %v", x.Attempt, c.after.Runtime)
		}
		is[x.Attempt] = true
	}
	for _, n := range c.after.Created {
		if made[n] {
			c.add("kubelet created an attempt twice: %v", c.after.Created)
		}
		made[n] = true
	}
}

// rollout: it tells the truth, and the pod's spec and what runs agree.
func (c *check) rollout() {
	was, live := running(c.before.Runtime), running(c.after.Runtime)
	if was == nil || live == nil {
		return // said already
	}
	if live.Image != c.after.Image {
		c.add("the pod's spec has %s, and %s runs", c.after.Image, live.Image)
	}
	switch c.after.Rollout {
	case RolledOut:
		c.rolledOut(was, live)
	case RolledBack:
		c.rolledBack(was, live)
	default:
		c.add("the rollout ended as %q", c.after.Rollout)
	}
}

func (c *check) rolledOut(was, live *Container) {
	if c.want.Outcome == Fails {
		c.add("the rollout succeeded, it should fail")
	}
	if c.after.Image != c.want.Image {
		c.add("the rollout succeeded, the pod's spec has %s instead of %s", c.after.Image, c.want.Image)
	}
	if live.ID == was.ID || live.Attempt != was.Attempt+1 {
		c.add("the rollout succeeded, %v runs in place of %v", *live, *was)
	}
	op := c.after.Operation
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || len(op.GetContainers()) != 1 {
		return
	}
	if one := op.GetContainers()[0]; one.GetMethod() != "kubelet" && (one.GetSuccessorId() != live.ID ||
		one.GetIncumbentId() != was.ID) {
		c.add("%v runs in place of %v, the operation says %s in place of %s", *live, *was, short(one.GetSuccessorId()),
			short(one.GetIncumbentId()))
	}
}

func (c *check) rolledBack(was, live *Container) {
	if c.want.Outcome == Succeeds {
		c.add("the rollout was rolled back, it should succeed")
	}
	if c.after.Image != c.before.Image {
		c.add("the rollout was rolled back, the pod's spec has %s instead of %s", c.after.Image, c.before.Image)
	}
	if c.want.Untouched && live.ID != was.ID {
		c.add("the rollout was rolled back and did not leave %v alone: %v runs", *was, *live)
	}
	if live.ID == was.ID && !c.want.Overlap && c.after.Starts != c.before.Starts {
		c.add("the incumbent runs on, but the application was started %d times", c.after.Starts)
	}
}
