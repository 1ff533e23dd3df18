// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imageupdate

import (
	"context"

	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// slotHolder takes the slot of an image update, and lets restarts go first.
type slotHolder struct{ c *swap.Container }

// keep is for an image update that had the slot in the process before this one. It may be taken
// back at once.
func (s *slotHolder) keep() {
	if s.c.Node.Waiters.Keep(s.c.Slot(), s.c.Op) {
		s.c.Node.TakeBack(s.c.Op, nil)
	}
}

// leave says that the image update has the slot no more.
func (s *slotHolder) leave() { s.c.Node.Waiters.Leave(s.c.Slot(), s.c.Op) }

// take waits for the slot, and until no restart waits for it.
func (s *slotHolder) take(ctx context.Context) error {
	for {
		if err := s.c.TakeSlot(ctx); err != nil {
			return err
		}
		over := s.c.Node.Waiters.Hold(s.c.Slot(), s.c.Op)
		if over == nil {
			return nil
		}
		s.drop()
		select {
		case <-over:
		case <-s.c.Op.Cancelled():
			return s.c.CancelledOutcome()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drop gives up the slot, in which the image update has made nothing.
func (s *slotHolder) drop() {
	s.leave()
	s.c.DropSlot()
}
