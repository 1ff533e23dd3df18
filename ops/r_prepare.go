// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"time"
)

// prepareSpecImage takes the slot once the image of the pod's spec is on the node: a pull may take
// long.
func (d *restarter) prepareSpecImage(ctx context.Context) error {
	want, err := d.c.image.OfSpec(ctx)
	if err != nil {
		return err
	}
	if want != nil {
		err := d.c.within(ctx, d.c.op.CreateTime(), defaultPrepare, func(ctx context.Context) error {
			return d.c.image.EnsureSpec(ctx, want)
		})
		if err != nil {
			return err
		}
	}
	return d.c.takeSlot(ctx)
}

// prepareImage pulls the image of a restart with another one and takes the slot. Whatever else
// needs a check is checked once the slot is taken.
func (d *restarter) prepareImage(ctx context.Context) error {
	if d.c.spec.GetRevertImage() {
		return d.prepareRevert(ctx)
	}
	if err := d.c.within(ctx, time.Now(), defaultPrepare, d.c.image.Pull); err != nil {
		return err
	}
	d.c.failpoint("pulled")
	return d.c.takeSlot(ctx)
}

// prepareRevert takes the slot once the image of the pod's spec is on the node.
func (d *restarter) prepareRevert(ctx context.Context) error {
	for pulled := ""; ; {
		if err := d.c.takeSlot(ctx); err != nil {
			return err
		}
		image, ready, err := d.c.image.RevertTo(ctx, pulled)
		if err != nil || ready {
			return err
		}
		// Not while the slot is taken: kubelet could not make the container anew.
		d.c.dropSlot()
		if err := d.c.within(ctx, time.Now(), defaultPrepare, d.c.image.Pull); err != nil {
			return err
		}
		pulled = image
	}
}
