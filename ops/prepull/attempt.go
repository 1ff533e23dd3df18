// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/imageinfo"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagefs"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

const (
	// dropTimeout bounds the wait for containerd to delete what a pull has brought.
	dropTimeout = 10 * time.Second
	// lookFirstBelow is the room on the disk, in compressed bytes, below which an image is looked
	// up before the runtime is asked to pull it. With more room, what the runtime fetches fills no
	// disk before the manifest is seen and the pull is ended.
	lookFirstBelow = 1 << 30
)

// attempt is one attempt of a pull. It runs without Puller.mu.
type attempt struct {
	*Puller
	u   *pull
	log logrus.FieldLogger
}

// run tries to pull once, with each credential that fits. On success it ends the operation.
func (a *attempt) run(ctx context.Context, given []*opsv1.RegistryCredential) error {
	u := a.u
	if u.req.GetPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		got, err := a.status(ctx)
		if err != nil {
			return err
		}
		if got != nil {
			// An earlier attempt, or process, may have brought it.
			if err := a.claims.Arrived(u.op.GetUid(), got.GetId(), u.named.String()); err != nil {
				return err
			}
			return a.succeed(ctx, got, opsv1.PullReasonPresent)
		}
	}
	host, repository := registry.HostOf(u.named)
	// The pull's own come before those of the node, as kubelet has pull secrets before its own.
	secret := keyring.Matching(given, u.named)
	nodes := keyring.Matching(a.plugins.Credentials(ctx, host+"/"+repository), u.named)
	credentials := slices.Concat(secret, nodes)
	if len(credentials) == 0 {
		credentials = append(credentials, nil) // anonymous
	}
	var last error
	for i, c := range credentials {
		// What the node itself may pull, all its pods may: only the pull's own credentials are
		// secrets.
		if i < len(secret) {
			if err := a.claims.Begin(ctx, u.op.GetUid(), u.named.String(), a.savePrivate); err != nil {
				return err
			}
		}
		err := a.pullWith(ctx, c)
		if err == nil {
			return a.pulled(ctx, i < len(secret))
		}
		f := registry.Explain(err, host)
		last = f
		if !f.Credentials || ctx.Err() != nil {
			break
		}
	}
	return last
}

// pulled ends the operation after the runtime has pulled the image. secret says that it did so with
// a credential that is not the node's.
func (a *attempt) pulled(ctx context.Context, secret bool) error {
	got, err := a.status(ctx)
	if err != nil {
		return err
	}
	if got == nil {
		return fmt.Errorf("the runtime has pulled %s and does not find it", a.u.named)
	}
	if secret {
		if err := a.claims.Arrived(a.u.op.GetUid(), got.GetId(), a.u.named.String()); err != nil {
			return err
		}
	}
	return a.succeed(ctx, got, opsv1.PullReasonPulled)
}

// savePrivate writes that the pull uses secrets, and the ID of the image that has its name now.
func (a *attempt) savePrivate(had string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.u.private, a.u.had = true, had
	return a.saveLocked(a.u)
}

func (a *attempt) spec() *runtimeapi.ImageSpec {
	return &runtimeapi.ImageSpec{
		Image: a.u.named.String(), UserSpecifiedImage: a.u.req.GetImage(), RuntimeHandler: a.u.req.GetRuntimeHandler(),
	}
}

// status returns the image as the runtime has it, or nil.
func (a *attempt) status(ctx context.Context) (*runtimeapi.Image, error) {
	resp, err := a.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: a.spec()})
	if err != nil {
		return nil, fmt.Errorf("asking the runtime for the image: %w", err)
	}
	return resp.GetImage(), nil
}

// pullWith pulls with one credential, or without.
func (a *attempt) pullWith(ctx context.Context, credential *opsv1.RegistryCredential) error {
	a.mu.Lock()
	a.u.limitAgainLocked()
	a.mu.Unlock()
	limit := a.u.limit(a.limit)
	id := a.u.lease()
	a.leasing.Lock()
	leased, err := a.store.Lease(ctx, id)
	a.leasing.Unlock()
	if err != nil {
		if !imagestore.Unavailable(err) {
			return err
		}
		if limit > 0 {
			a.withoutLimit(limit, "the runtime is not containerd")
		}
		return a.pullCRI(ctx, credential)
	}
	search, err := a.store.NewSearch(leased, id)
	if err != nil {
		return fmt.Errorf("what is there of the image: %w", err)
	}
	s := &sight{search: search}
	limiter := registry.NewLimiter(limit)
	a.u.limiter.Store(limiter)
	image, here, err := a.lookFirst(ctx, leased, credential, s, limiter, limit)
	if err != nil {
		return err
	}
	if image != nil {
		defer image.Close()
	}
	pulling, stop := context.WithCancel(leased)
	defer stop()
	ended, tracked := make(chan struct{}), make(chan struct{})
	go func() { // ends with ended
		defer close(tracked)
		guard.Do(a.log, func() { a.track(leased, s, stop, ended) })
	}()
	over := sync.OnceFunc(func() {
		close(ended)
		<-tracked
	})
	defer over()
	a.u.slots.Store(!here)
	if here {
		err = a.fetchLayers(pulling, image, s, limiter, limit)
	}
	if err == nil {
		err = a.pullCRI(pulling, credential)
	}
	over()
	if err != nil && s.refused != nil {
		return a.refuse(ctx, s, s.refused)
	}
	return err
}

// lookFirst looks the image up before the runtime is asked, if its layers are to be fetched here or
// the disk has little room. It returns the image if that succeeded, and whether its layers are to
// be fetched here.
func (a *attempt) lookFirst(
	ctx, leased context.Context, credential *opsv1.RegistryCredential, s *sight, limiter *rate.Limiter, limit int64,
) (image *registry.Image, here bool, err error) {
	here = limiter != nil || a.yielder.slotsWanted(leased, a.u) && a.needsLayers(leased)
	if !here && a.checkDisk(ctx, lookFirstBelow) == nil {
		return nil, false, nil
	}
	image, m, f := a.lookUp.Manifest(leased, a.u.named, credential, limiter, a.store.Content)
	if f == nil {
		err := a.sighted(leased, s, m)
		if err == nil {
			return image, here, nil
		}
		image.Close()
		if s.m != nil {
			return nil, false, a.refuse(ctx, s, err)
		}
		return nil, false, err
	}
	if ctx.Err() != nil {
		return nil, false, f
	}
	// The runtime's own configuration is what counts, and its word on what is wrong.
	if err := a.checkDisk(ctx, imagefs.UnknownSize); err != nil {
		return nil, false, err
	}
	if limiter != nil {
		a.withoutLimit(limit, f.Message)
	}
	return nil, false, nil
}

// fetchLayers fetches, within the limit if there is one, what the runtime would fetch. Without a
// limit only the runtime's word counts.
func (a *attempt) fetchLayers(
	ctx context.Context, image *registry.Image, s *sight, limiter *rate.Limiter, limit int64,
) error {
	before := image.BytesRead()
	err := image.Layers(ctx, a.log, a.store.Content, s.m.Layers[s.present:], limiter)
	if err == nil || ctx.Err() != nil {
		return err
	}
	host, _ := registry.HostOf(a.u.named)
	f := registry.Explain(err, host)
	// A registry that does not let us in, or sends us nothing at all, may treat the runtime
	// otherwise. In other trouble it is asked again, within the limit.
	var answer remoteerrors.ErrUnexpectedStatus
	silent := image.BytesRead() == before && !errors.As(err, &answer) && registry.IsNetwork(f.Message)
	if limiter == nil || f.Credentials || silent {
		if limiter != nil {
			a.withoutLimit(limit, f.Message)
		} else {
			a.log.WithField("reason", f.Reason).Debug("layers are left to the runtime: " + f.Message)
		}
		a.u.slots.Store(true)
		return nil
	}
	return f
}

// withoutLimit says in the operation that its speed limit is not kept, and why.
func (a *attempt) withoutLimit(limit int64, why string) {
	a.log.WithField("error", why).Warn("pulling without the speed limit: the runtime knows none")
	a.mu.Lock()
	defer a.mu.Unlock()
	a.u.unlimitedLocked(limit, why)
}

// refuse deletes what a pull that does not fit on the disk has brought. What earlier attempts have
// brought stays as long as theirs.
func (a *attempt) refuse(ctx context.Context, s *sight, err error) error {
	if !s.search.Fresh() {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
	defer cancel()
	if err := a.store.DropLease(ctx, a.u.lease(), leases.SynchronousDelete); err != nil {
		a.log.WithError(err).Warn("lease not ended, it expires by itself")
	}
	return err
}

func (a *attempt) pullCRI(ctx context.Context, credential *opsv1.RegistryCredential) error {
	_, err := a.images.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: a.spec(), Auth: registry.AuthConfig(credential),
		SandboxConfig: &runtimeapi.PodSandboxConfig{
			Labels: a.u.req.GetSandboxLabels(), Annotations: a.u.req.GetSandboxAnnotations(),
		},
	})
	return err
}

// succeed ends the operation with the image that is there, and pins it. An image that cannot run
// here is no success.
func (a *attempt) succeed(ctx context.Context, image *runtimeapi.Image, reason string) error {
	if err := a.checkPlatform(ctx); err != nil {
		return err
	}
	message, notPinned, err := a.pin(ctx, image)
	if err != nil {
		return err
	}
	if err := a.store.DropLease(context.WithoutCancel(ctx), a.u.lease()); err != nil && !imagestore.Unavailable(err) {
		a.log.WithError(err).Warn("lease not ended, it expires by itself")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	op := a.u.op
	op.ImageId, op.NotPinned = image.GetId(), notPinned
	if op.GetBytesFetched() > 0 {
		reason = opsv1.PullReasonPulled // even if kubelet has done the rest
	}
	if op.GetBytesTotal() > 0 {
		op.BytesDone = op.GetBytesTotal()
		for _, l := range op.GetLayers() {
			l.BytesDone = l.GetBytesTotal()
		}
	}
	a.finishLocked(a.u, opsv1.PullPhase_PULL_SUCCEEDED, reason, message)
	return nil
}

// pin pins the image if the command asks for that. It returns the message of the pull, and why the
// image is not pinned.
func (a *attempt) pin(ctx context.Context, image *runtimeapi.Image) (message, notPinned string, err error) {
	keep := a.u.req.GetPinFor().AsDuration()
	if keep <= 0 {
		return "", "", nil
	}
	kind, _, _ := strings.Cut(a.u.req.GetOwner(), "/")
	notPinned = a.disk.PinsFull(ctx, kind, float64(a.u.req.GetPinPercent()), a.pins.Sizes(kind), image)
	if notPinned == "" {
		err = a.pins.Add(ctx, image, a.u.named.String(), a.u.req.GetOwner(), time.Now().Add(keep))
	}
	switch {
	case errors.Is(err, imagestore.ErrNotOurs):
		return err.Error(), "", nil
	case err != nil && imagestore.Unavailable(err):
		notPinned = "the runtime has no way to"
	case err != nil:
		return "", "", fmt.Errorf("pinning: %w", err)
	}
	if notPinned != "" {
		message = "not pinned: " + notPinned
	}
	return message, notPinned, nil
}

// checkDisk refuses the pull if it would fill the disk; see [imagefs.Guard.Check].
func (a *attempt) checkDisk(ctx context.Context, missing int64) error {
	a.mu.Lock()
	urgent := a.u.urgent
	a.mu.Unlock()
	return a.disk.Check(ctx, urgent, missing)
}

// checkPlatform returns a failure if the image that is there is not made for this node. The runtime
// itself says so only of an image with several manifests; another one stays on the node. Whoever
// waits for an urgent pull looks at the image himself.
func (a *attempt) checkPlatform(ctx context.Context) error {
	a.mu.Lock()
	urgent := a.u.urgent
	a.mu.Unlock()
	if urgent {
		return nil
	}
	st, err := a.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: a.spec(), Verbose: true})
	if err != nil {
		return fmt.Errorf("asking the runtime for the image's platform: %w", err)
	}
	config := imageinfo.Config(st)
	if config == nil {
		return nil
	}
	if err := imageinfo.CheckPlatform(config, a.u.named.String(), runtime.GOOS, runtime.GOARCH); err != nil {
		return &registry.Failure{Reason: opsv1.PullReasonInvalidImage, Final: true, Message: fmt.Sprintf(
			"the image is not made for this node's platform (%v): "+
				"push one for it, or a list of manifests that has one, or choose other nodes", err)}
	}
	return nil
}

// needsLayers reports whether the image is surely unpacked from whole layers. Other snapshotters,
// such as stargz, soci, nydus and gcfs, may fetch only what somebody reads of the layers.
func (a *attempt) needsLayers(ctx context.Context) bool {
	switch a.snapshotter(ctx) {
	case "overlayfs", "fuse-overlayfs", "native", "btrfs", "zfs", "devmapper", "erofs", "blockfile":
		return true
	}
	return false
}

// snapshotter returns the name of the snapshotter that unpacks the image.
func (a *attempt) snapshotter(ctx context.Context) string {
	return a.store.Snapshotter(ctx, a.images, a.runtime, a.u.req.GetRuntimeHandler())
}
