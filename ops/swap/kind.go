// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Kind is what a restart and an upgrade do with a container each in its own way.
type Kind interface {
	// Name is restart or upgrade.
	Name() string
	// Drive takes the container through the steps. It returns nil on success, an
	// [operation.Outcome], or the error of a call that was cut off.
	Drive(ctx context.Context) error
	// Over says that Drive has returned: kubelet is answered no more. left says that the next
	// process goes on.
	Over(left bool)
	// WantSlot says that the operation waits for the slot. The caller must call got when it waits
	// no more.
	WantSlot() (got func())
	// Taken says that the operation has the slot.
	Taken()
	// Adopted reports whether kubelet asks for the successor by a CreateContainer of its own, and
	// so takes it over. Otherwise the successor is shown to it in the place of the incumbent.
	Adopted() bool
	// NextImage is the image of the container that kubelet makes instead of taking the successor
	// over; empty if that is not known.
	NextImage() string
	// Staged makes the record that of a container whose successor has been staged.
	Staged(rec *store.Container, status *opsv1.ContainerOperation)
	// Revealed reports whether this process has shown the successor to kubelet.
	Revealed() bool
	// IsJoint reports whether the failure of one container ends the operation on the others.
	IsJoint() bool
	// Succeeded and Failed say how the operation on the container ends. Succeeded is called before
	// that is written, Failed after that.
	Succeeded()
	Failed()
}
