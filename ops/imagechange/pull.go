// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagechange

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

const (
	// defaultPin is how long images stay pinned if the command does not say.
	defaultPin = 24 * time.Hour
	// pinTimeout bounds the pinning of the old image: the slot is taken meanwhile.
	pinTimeout = 10 * time.Second
)

// Pull gets the new image onto the node and pins it.
func (c *Change) Pull(ctx context.Context) error {
	if c.want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER {
		return c.ensure(ctx, c.want)
	}
	return c.pull(ctx, c.want)
}

// EnsureVolumes makes sure of the images of volumes, as kubelet does before each start
// (kuberuntime_manager.go getImageVolumes).
func (c *Change) EnsureVolumes(ctx context.Context) error {
	env, _ := c.c.Operation.Environment(c.spec.GetName())
	if c.node.Puller == nil {
		return nil
	}
	for _, v := range env.GetImageVolumes() {
		err := c.ensure(ctx, &opsv1.ContainerUpgrade{
			Name: c.spec.GetName(), Image: v.GetReference(), PullPolicy: v.GetPullPolicy(),
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// OfSpec returns the image of the pod's spec, which a plain restart needs on the node; nil if there
// is nothing to ensure.
func (c *Change) OfSpec(ctx context.Context) (*opsv1.ContainerUpgrade, error) {
	if c.node.Puller == nil || c.node.Overrides.Of(c.slot()) != nil {
		return nil, nil
	}
	if err := c.node.Runtime.AwaitRuntime(ctx); err != nil {
		return nil, err
	}
	// What cannot be found is said when the slot is taken.
	found, err := c.resolve(ctx)
	if err != nil {
		return nil, nil //nolint:nilerr // see above
	}
	request, err := c.node.RequestOf(ctx, found.Incumbent, found.Sandbox)
	if err != nil {
		return nil, nil //nolint:nilerr // see above
	}
	return &opsv1.ContainerUpgrade{
		Name: c.spec.GetName(), Image: request.GetConfig().GetImage().GetUserSpecifiedImage(),
		PullPolicy: c.spec.GetPullPolicy(),
	}, nil
}

// EnsureSpec makes sure of the image that OfSpec has returned as kubelet does before each start
// (image_manager.go EnsureImageExists), and of those of volumes.
func (c *Change) EnsureSpec(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	if want.GetImage() != "" { // else kubelet is an old one that does not tell
		if err := c.ensure(ctx, want); err != nil {
			return err
		}
	}
	return c.EnsureVolumes(ctx)
}

func (c *Change) resolve(ctx context.Context) (*crinode.Target, error) {
	return c.node.Runtime.Resolve(ctx, c.c.Operation.Pod(), c.spec, c.c.Operation.Request().GetForce())
}

// ensure has the image on the node, by the container's policy.
func (c *Change) ensure(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	if want.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		image, err := c.node.find(ctx, want.GetImage())
		switch {
		case err != nil:
			return err
		case image != nil:
			return nil
		case want.GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER:
			return operation.Failf(opsv1.ReasonErrImageNeverPull,
				"Container image %q is not present with pull policy of "+
					"Never", want.GetImage())
		}
	}
	return c.pull(ctx, want)
}

// pull gets an image onto the node and, if it is that of a change, pins it. Credentials that come
// meanwhile start the pull anew; what has been fetched counts.
func (c *Change) pull(ctx context.Context, want *opsv1.ContainerUpgrade) error {
	c.handle.Show(func(s *opsv1.ContainerOperation) { s.Phase = opsv1.Phase_PHASE_PULLING })
	for {
		again, err := c.pullOnce(ctx, want)
		if !again {
			return err
		}
	}
}

// pullOnce is pull with the credentials that the operation has. It returns true if there are others
// by now.
func (c *Change) pullOnce(ctx context.Context, want *opsv1.ContainerUpgrade) (again bool, err error) {
	credentials, forgotten, others := c.c.Operation.Credentials()
	c.c.Failpoint("pulling")
	req := &opsv1.PullRequest{
		Uid: kindOf(c.c.Operation) + "-" + operation.RandomToken(), Image: want.GetImage(),
		Policy:      want.GetPullPolicy(),
		Credentials: credentials, Owner: pinOwner(c.c.Operation),
	}
	if c.want != nil { // else as kubelet's own
		req.PinFor = durationpb.New(pinFor(c.c.Operation))
	}
	if by, ok := ctx.Deadline(); ok {
		req.Deadline = durationpb.New(max(time.Second, time.Until(by)))
	}
	pull, end := crinode.EndWith(ctx, others)
	done, err := c.node.Puller.Ensure(pull, req, c.showPull)
	again = pull.Err() != nil && ctx.Err() == nil
	end()
	switch {
	case err == nil && done.GetPhase() == opsv1.PullPhase_PULL_SUCCEEDED:
		c.showPull(done)
		return false, nil
	case again:
		return true, nil
	case ctx.Err() != nil:
		return false, ctx.Err()
	case err != nil:
		return false, operation.Failf(opsv1.ReasonPullFailed, "pulling %s: %v", want.GetImage(), err)
	case forgotten:
		c.c.Log.WithField("reason", done.GetReason()).
			Info("waiting for the credentials, which were in the memory of the process before this one")
		c.handle.Show(func(s *opsv1.ContainerOperation) {
			s.Pull = briefly(done)
			s.Pull.Phase, s.Pull.Reason = opsv1.PullPhase_PULL_WAITING, opsv1.ReasonCredentialsNeeded
			s.Pull.Message = "cri-proxy was restarted and does not keep credentials: " +
				"waiting for the command to be repeated"
		})
		select {
		case <-others:
			return true, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	default:
		c.showPull(done)
		return false, operation.Failf(opsv1.ReasonPullFailed, "pulling %s: %s: %s",
			want.GetImage(), done.GetReason(), done.GetMessage())
	}
}

// showPull shows how far a pull is.
func (c *Change) showPull(p *opsv1.PullOperation) {
	c.handle.Show(func(s *opsv1.ContainerOperation) { s.Pull = briefly(p) })
}

// briefly is what an operation tells of its pull.
func briefly(p *opsv1.PullOperation) *opsv1.PullOperation {
	return &opsv1.PullOperation{
		Phase: p.GetPhase(), Reason: p.GetReason(), Message: p.GetMessage(), ImageId: p.GetImageId(),
		BytesDone: p.GetBytesDone(), BytesTotal: p.GetBytesTotal(), BytesFetched: p.GetBytesFetched(),
		BytesPerSecond: p.GetBytesPerSecond(),
	}
}

// kindOf is restart or upgrade.
func kindOf(o *operation.Operation) string {
	if o.Upgrade() != nil {
		return "upgrade"
	}
	return "restart"
}

// pinOwner is whose pins the images get.
func pinOwner(o *operation.Operation) string {
	if owner := o.Upgrade().GetOwner(); owner != "" {
		return owner
	}
	if requester := o.Requester(); requester != "" {
		return requester
	}
	return kindOf(o) + " " + o.UID()
}

// pinFor is for how long.
func pinFor(o *operation.Operation) time.Duration {
	if d := o.Upgrade().GetPinFor().AsDuration(); d > 0 {
		return d
	}
	return defaultPin
}

// pinOld keeps the image that is replaced on the node, for the way back. The slot is taken: what is
// staged in it is not taken for what runs.
func (c *Change) pinOld(ctx context.Context, at *crinode.Target) {
	ctx, cancel := context.WithTimeout(ctx, pinTimeout)
	defer cancel()
	st, err := c.node.Runtime.Runtime.ContainerStatus(ctx,
		&runtimeapi.ContainerStatusRequest{ContainerId: at.Incumbent})
	if err == nil {
		o := c.c.Operation
		err = c.node.Puller.Pin(ctx, st.GetStatus().GetImageRef(), pinOwner(o), time.Now().Add(pinFor(o)))
	}
	if err != nil {
		c.c.Warn("the old image is not pinned: %v", err)
	}
}

// find returns what the runtime knows of an image; nil if the node has none of that name.
func (n *Node) find(ctx context.Context, name string) (image *runtimeapi.Image, err error) {
	err = n.Runtime.Retry(ctx, func() error {
		st, err := n.Service.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
		image = st.GetImage()
		return err
	})
	if err != nil {
		return nil, operation.Failf(opsv1.ReasonRuntimeError, "reading image %s: %v", name, err)
	}
	return image, nil
}

// inspect is the verbose status of an image that is on the node.
func (n *Node) inspect(ctx context.Context, name string) (*runtimeapi.ImageStatusResponse, error) {
	st, err := n.Service.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{
		Image: &runtimeapi.ImageSpec{Image: name}, Verbose: true,
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the image: %w", err)
	case st.GetImage() == nil:
		return nil, operation.Failf(opsv1.ReasonPullFailed,
			"the runtime does not know %s, which has been pulled: was it "+
				"removed meanwhile?", name)
	}
	return st, nil
}
