// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"slices"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Container is one container of an operation.
type Container struct {
	op *Operation
	i  int
}

// Container returns the operation's container at an index of its request.
func (o *Operation) Container(i int) *Container { return &Container{op: o, i: i} }

// Records returns a copy of the journal's part of all containers.
func (o *Operation) Records() []store.Container {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.containers)
}

// Request is what the operation wants of the container; see [Command].
func (c *Container) Request() *opsv1.ContainerRestart { return c.op.restart.GetContainers()[c.i] }

// Slot is the container's slot.
func (c *Container) Slot() view.Slot {
	return view.Slot{PodUID: c.op.Pod().GetUid(), Container: c.Request().GetName()}
}

// Record returns a copy of the journal's part.
func (c *Container) Record() store.Container {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	return c.op.containers[c.i]
}

// Status returns a copy of the public state.
func (c *Container) Status() *opsv1.ContainerOperation {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	return proto.Clone(c.op.op.GetContainers()[c.i]).(*opsv1.ContainerOperation)
}

// Write changes the journal's part and the public state in one durable step, and returns the step
// that the container is at then.
//
// Errors: an [Outcome], if the journal cannot be written. The journal's part is then as before.
func (c *Container) Write(f func(rec *store.Container, status *opsv1.ContainerOperation)) (store.Step, error) {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	return c.writeLocked(f, func() {})
}

// End is Write for the container's last step. If all other containers have ended, the end of the
// operation is on disk with the same write: the next process finds nothing left to do. Nobody is
// told of that before [Operation.Conclude], so that the container's slot can be released in
// between.
func (c *Container) End(f func(rec *store.Container, status *opsv1.ContainerOperation)) (store.Step, error) {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	written := false // not after a panic either
	defer func() {
		if !written {
			c.op.final = nil
		}
	}()
	step, err := c.writeLocked(f, func() { c.op.final = c.op.finishedLocked() })
	written = err == nil
	return step, err
}

// writeLocked is Write; it calls ready after the change. The caller holds the operation's mutex.
func (c *Container) writeLocked(
	f func(rec *store.Container, status *opsv1.ContainerOperation), ready func(),
) (store.Step, error) {
	before := c.op.containers[c.i]
	c.changeLocked(f)
	ready()
	if err := c.op.saveLocked(); err != nil {
		c.op.containers[c.i] = before
		return "", Failf(opsv1.ReasonJournalError, "%v", err)
	}
	c.op.notifyLocked()
	return c.op.containers[c.i].Step, nil
}

func (c *Container) changeLocked(f func(rec *store.Container, status *opsv1.ContainerOperation)) {
	f(&c.op.containers[c.i], c.op.latestLocked().GetContainers()[c.i])
}

// Note is Write for the time after the switch: the successor serves, and a journal that cannot be
// written is no reason to take it away. The change then counts in memory. The next process would
// resume from an earlier step, and find the successor running.
func (c *Container) Note(f func(rec *store.Container, status *opsv1.ContainerOperation)) (store.Step, error) {
	step, err := c.Write(f)
	if err != nil {
		c.op.mu.Lock()
		defer c.op.mu.Unlock()
		c.changeLocked(f)
		c.op.notifyLocked()
	}
	return step, err
}

// Set changes the journal's part and the public state in memory. The change is on disk with the
// next step, and watchers are told with it.
func (c *Container) Set(f func(rec *store.Container, status *opsv1.ContainerOperation)) {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	c.changeLocked(f)
}

// Show changes the public state in memory and tells watchers.
func (c *Container) Show(f func(status *opsv1.ContainerOperation)) {
	c.op.Change(func(op *opsv1.Operation) { f(op.GetContainers()[c.i]) })
}

// Claim is what the process before this one had in the container's slot; nil if it had nothing.
func (c *Container) Claim() *view.Claim {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	return c.op.claims[c.i]
}

// SetClaim sets [Container.Claim].
func (c *Container) SetClaim(claim *view.Claim) {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	c.op.claims[c.i] = claim
}

// IsCertain reports whether the successor is known to be what kubelet asks for: kubelet has asked
// for it, or somebody who knows has said so.
func (c *Container) IsCertain() bool {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	return c.op.certain[c.Request().GetName()] || c.op.containers[c.i].Asked
}

// SetCertain says that the successor is what kubelet asks for.
func (c *Container) SetCertain() {
	c.op.mu.Lock()
	defer c.op.mu.Unlock()
	c.op.certain[c.Request().GetName()] = true
}
