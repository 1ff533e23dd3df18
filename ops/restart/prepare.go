// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package restart

import (
	"context"
	"time"

	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// prepareSpecImage takes the slot once the image of the pod's spec is on the node: a pull may take
// long.
func (d *driver) prepareSpecImage(ctx context.Context) error {
	want, err := d.c.Image.OfSpec(ctx)
	if err != nil {
		return err
	}
	if want != nil {
		err := d.c.Within(ctx, d.c.Op.CreateTime(), swap.DefaultPrepare, func(ctx context.Context) error {
			return d.c.Image.EnsureSpec(ctx, want)
		})
		if err != nil {
			return err
		}
	}
	return d.c.TakeSlot(ctx)
}

// prepareImage pulls the image of a restart with another one and takes the slot. Whatever else
// needs a check is checked once the slot is taken.
func (d *driver) prepareImage(ctx context.Context) error {
	if d.c.Spec.GetRevertImage() {
		return d.prepareRevert(ctx)
	}
	if err := d.c.Within(ctx, time.Now(), swap.DefaultPrepare, d.c.Image.Pull); err != nil {
		return err
	}
	d.c.Failpoint("pulled")
	return d.c.TakeSlot(ctx)
}

// prepareRevert takes the slot once the image of the pod's spec is on the node.
func (d *driver) prepareRevert(ctx context.Context) error {
	for pulled := ""; ; {
		if err := d.c.TakeSlot(ctx); err != nil {
			return err
		}
		image, ready, err := d.c.Image.RevertTo(ctx, pulled)
		if err != nil || ready {
			return err
		}
		// Not while the slot is taken: kubelet could not make the container anew.
		d.c.DropSlot()
		if err := d.c.Within(ctx, time.Now(), swap.DefaultPrepare, d.c.Image.Pull); err != nil {
			return err
		}
		pulled = image
	}
}
