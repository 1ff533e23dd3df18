// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package imagechange finds the image of a successor: it pulls the image, pins it, checks whether
// it can take the place of the one there, and keeps the override that a restart with another image
// leaves.
package imagechange

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Puller puts images on the node for upgrades and overrides. [*prepull.Puller] does.
type Puller interface {
	// Ensure pulls an image unless it is there, and reports changes to each. It returns the
	// finished pull, or ctx's error.
	Ensure(ctx context.Context, req *opsv1.PullRequest, each func(*opsv1.PullOperation)) (*opsv1.PullOperation, error)
	// Pin keeps an image that is on the node from kubelet's image garbage collection.
	Pin(ctx context.Context, image, owner string, until time.Time) error
}

// Node is what the changes of all containers of the node share.
type Node struct {
	Runtime *crinode.Client
	Service runtimeapi.ImageServiceClient
	// Puller is nil on a node that pulls no images: it has no upgrades and overrides.
	Puller    Puller
	Overrides *store.Overrides
	// RequestOf returns the request that made a container.
	RequestOf func(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, error)
}

// Container is the operation on one container, as the change of its image sees it.
type Container struct {
	Operation *operation.Operation
	Index     int // of the container, in the operation
	Log       logrus.FieldLogger
	// Warn tells the user.
	Warn func(format string, args ...any)
	// Failpoint is where a test may end or hold the process.
	Failpoint func(name string)
}

// Change is what an operation does with the image of one container.
type Change struct {
	node   *Node
	c      Container
	handle *operation.Container
	spec   *opsv1.ContainerRestart
	// want has the new image; nil if the image stays. A restart that goes back to the image of the
	// pod's spec does not know it before the slot is taken.
	want *opsv1.ContainerUpgrade
	// image is the new image and old the incumbent's, as the runtime tells them; nil until they are
	// known.
	image, old *runtimeapi.Image
	// before was the slot's override before this operation changed it, which it has if changed is
	// set.
	before  *store.Override
	changed bool
}

// Of returns the change of a container's image. It asks nobody yet.
func (n *Node) Of(c Container) *Change {
	handle := c.Operation.Container(c.Index)
	ch := &Change{node: n, c: c, handle: handle, spec: handle.Request()}
	switch {
	case ch.isUpgrade():
		ch.want = c.Operation.Upgrade().GetContainers()[c.Index]
	case ch.spec.GetImage() != "" || ch.spec.GetRevertImage():
		ch.want = &opsv1.ContainerUpgrade{
			Name: ch.spec.GetName(), Image: handle.Status().GetImage(), PullPolicy: ch.spec.GetPullPolicy(),
		}
	}
	return ch
}

// isUpgrade reports whether the pod's spec gets the image, too. Otherwise it is an override of it.
func (c *Change) isUpgrade() bool { return c.c.Operation.Upgrade() != nil }

// Changes reports whether the operation is for another image. Without, a restart uses what the
// image of the pod's spec means by now.
func (c *Change) Changes() bool { return c.want != nil }

// Image returns the new image, as the command has it; empty if the image stays.
func (c *Change) Image() string { return c.want.GetImage() }

func (c *Change) slot() view.Slot { return c.handle.Slot() }

// Keep makes the image that of the slot from now on, once, unless it is that of the pod's spec. It
// is on disk with the next step, which is the one that reveals the successor.
func (c *Change) Keep() {
	if c.want == nil || c.isUpgrade() || c.changed {
		return
	}
	c.before, c.changed = c.node.Overrides.Set(c.slot(), c.handle.Record().Override), true
}

// Undo takes Keep back, on disk with the next step.
func (c *Change) Undo() {
	if !c.changed {
		return
	}
	c.node.Overrides.Set(c.slot(), c.before)
	c.changed = false
}
