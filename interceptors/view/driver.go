// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Driver is an operation that takes part in what kubelet does in the slot. It does not act by
// itself but lets kubelet drive, or it stops the incumbent itself when kubelet comes to stop it
// too. It has a container ready for what kubelet does next. Both methods block until the operation
// has decided.
type Driver interface {
	// Stop is asked when kubelet stops the incumbent, with the grace in seconds. If it returns
	// true, the incumbent has been stopped and the successor has taken over, or the error says why
	// the incumbent has not been stopped. If it returns false, the operation yields and
	// kubelet's call goes on as without it.
	Stop(ctx context.Context, grace int64) (bool, error)
	// Create is asked when kubelet creates a container in the slot. If it returns true, the ID is
	// that of the container that kubelet asks for, or "" when the call waits for the end of the
	// operation and then goes on as without it. If it returns false, the operation yields.
	Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (id string, ok bool)
}

// Drive lets kubelet drive from now on, until the claim is released.
func (c *Claim) Drive(d Driver) {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	if c.driver != nil {
		return
	}
	c.driver = d
	if c.driven == nil {
		c.driven = make(chan struct{})
	}
	close(c.driven)
}

// WillDrive makes kubelet's calls on the slot wait for [Claim.Drive]. It is for the time before the
// first call is served.
func (c *Claim) WillDrive() {
	c.slots.mu.Lock()
	defer c.slots.mu.Unlock()
	if c.driven == nil {
		c.driven = make(chan struct{})
	}
}

// AwaitDriver returns the claim's driver. It returns nil if the claim has none or is released
// before it has one, or if ctx ends first.
func (c *Claim) AwaitDriver(ctx context.Context) Driver {
	c.slots.mu.RLock()
	driven := c.driven
	c.slots.mu.RUnlock()
	if driven == nil {
		return nil
	}
	select {
	case <-driven:
	case <-c.done:
		return nil
	case <-ctx.Done():
		return nil
	}
	c.slots.mu.RLock()
	defer c.slots.mu.RUnlock()
	if c.released {
		return nil
	}
	return c.driver
}
