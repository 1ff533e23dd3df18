// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

// progressEvery is how often the content store is asked how far a pull is. The question takes a millisecond.
const progressEvery = 250 * time.Millisecond

const (
	// lookEvery is how often it is asked for the manifest, in the time that a registry usually needs: until the manifest is
	// known, a pull that does not fit on the disk is not ended.
	lookEvery   = 20 * time.Millisecond
	lookClosely = 5 * time.Second
	// dropPatience bounds the wait for containerd to delete what a pull has brought.
	dropPatience = 10 * time.Second
)

// attempt tries to pull once, with each credential that fits. On success it ends the operation.
func (p *Puller) attempt(ctx context.Context, u *pull, given []*opsv1.RegistryCredential) error {
	image := u.named.String()
	if u.req.GetPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		got, err := p.status(ctx, u)
		if err != nil {
			return err
		}
		if got != nil {
			if err := p.arrived(u.op.GetUid(), got.GetId(), image); err != nil { // of an earlier attempt, or process
				return err
			}
			return p.succeed(ctx, u, got, opsv1.PullReasonPresent)
		}
	}
	host, repository := registryOf(u.named)
	// Those of the pull come before those of the node, as kubelet has pull secrets before its own.
	secret := keyring.Matching(given, u.named)
	credentials := slices.Concat(secret, keyring.Matching(p.plugins.Credentials(ctx, host+"/"+repository), u.named))
	if len(credentials) == 0 {
		credentials = append(credentials, nil) // anonymous
	}
	var errs []error
	for i, c := range credentials {
		if i < len(secret) {
			if err := p.arriving(ctx, u); err != nil {
				return err
			}
		}
		err := p.pullWith(ctx, u, c)
		if err == nil {
			got, err := p.status(ctx, u)
			if err != nil {
				return err
			}
			if got == nil {
				return fmt.Errorf("the runtime has pulled %s and does not find it", image)
			}
			if i < len(secret) { // what the node itself may pull, all its pods may
				if err := p.arrived(u.op.GetUid(), got.GetId(), image); err != nil {
					return err
				}
			}
			return p.succeed(ctx, u, got, opsv1.PullReasonPulled)
		}
		f := explain(err, host)
		errs = append(errs, f)
		if !f.credentials || ctx.Err() != nil {
			break
		}
	}
	return errs[len(errs)-1]
}

func (p *Puller) spec(u *pull) *runtimeapi.ImageSpec {
	return &runtimeapi.ImageSpec{Image: u.named.String(), UserSpecifiedImage: u.req.GetImage(), RuntimeHandler: u.req.GetRuntimeHandler()}
}

// status returns the image as the runtime has it, or nil.
func (p *Puller) status(ctx context.Context, u *pull) (*runtimeapi.Image, error) {
	resp, err := p.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: p.spec(u)})
	if err != nil {
		return nil, fmt.Errorf("asking the runtime for the image: %w", err)
	}
	return resp.GetImage(), nil
}

// pullWith pulls with one credential, or without.
func (p *Puller) pullWith(ctx context.Context, u *pull, credential *opsv1.RegistryCredential) error {
	p.forgetUnlimited(u)
	limit := p.limitOf(u)
	id := leaseID(u.key)
	p.leasing.Lock()
	leased, err := p.store.lease(ctx, id)
	p.leasing.Unlock()
	if err != nil {
		if !unavailable(err) {
			return err
		}
		if limit > 0 {
			p.withoutLimit(u, limit, "the runtime is not containerd")
		}
		return p.pullCRI(ctx, u, credential)
	}
	q, err := p.store.newSearch(leased, id)
	if err != nil {
		return fmt.Errorf("what is there of the image: %w", err)
	}
	w := &sight{search: q}
	var r *remote
	limiter := newLimiter(limit)
	u.limiter.Store(limiter)
	here := limiter != nil || p.slotsWanted(leased, u) && p.needsLayers(leased, u) // the layers are fetched here, and not by the runtime
	if here || p.checkDisk(ctx, u, lookFirst) != nil {
		var m *manifest
		var f *failure
		if r, m, f = p.lookUp(leased, u, credential, limiter); f == nil {
			defer r.close()
			if err := p.sighted(leased, u, w, m); err != nil && w.m != nil {
				return p.refuse(ctx, u, w, err)
			} else if err != nil {
				return err
			}
		} else {
			if ctx.Err() != nil {
				return f
			}
			// The runtime's own configuration is what counts, and its word on what is wrong.
			if err := p.checkDisk(ctx, u, unknown); err != nil {
				return err
			}
			if limiter != nil {
				p.withoutLimit(u, limit, f.message)
			}
		}
	}
	pulling, stop := context.WithCancel(leased)
	defer stop()
	ended, tracked := make(chan struct{}), make(chan struct{})
	go func() { // ends with ended
		defer close(tracked)
		guard.Do(p.log.WithFields(u.fields()), func() { p.track(leased, u, w, stop, ended) })
	}()
	over := sync.OnceFunc(func() {
		close(ended)
		<-tracked
	})
	defer over()
	here = here && r != nil
	u.slots.Store(!here)
	if here {
		err = p.fetchLayers(pulling, u, r, w, limiter, limit)
	}
	if err == nil {
		err = p.pullCRI(pulling, u, credential)
	}
	over()
	if err != nil && w.refused != nil {
		return p.refuse(ctx, u, w, w.refused)
	}
	return err
}

// fetchLayers fetches within the limit, if there is one, what the runtime would fetch. Without one nothing but the runtime's word counts.
func (p *Puller) fetchLayers(ctx context.Context, u *pull, r *remote, w *sight, limiter *rate.Limiter, limit int64) error {
	before := r.read.Load()
	err := r.layers(ctx, p.log.WithFields(u.fields()), p.store.content, w.m.layers[w.present:], limiter)
	if err == nil || ctx.Err() != nil {
		return err
	}
	host, _ := registryOf(u.named)
	f := explain(err, host)
	// One that lets us not in, or sends us nothing at all, may treat the runtime otherwise. Another is asked again, within the limit.
	var answer remoteerrors.ErrUnexpectedStatus
	if limiter == nil || f.credentials || r.read.Load() == before && !errors.As(err, &answer) && isNetwork(f.message) {
		if limiter != nil {
			p.withoutLimit(u, limit, f.message)
		} else {
			p.log.WithFields(u.fields()).WithField("reason", f.reason).Debug("layers are left to the runtime: " + f.message)
		}
		u.slots.Store(true)
		return nil
	}
	return f
}

// refuse gives back what a pull that does not fit on the disk has brought. What earlier attempts have brought stays as long as theirs.
func (p *Puller) refuse(ctx context.Context, u *pull, w *sight, err error) error {
	if !w.search.fresh {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropPatience)
	defer cancel()
	if err := p.store.dropLease(ctx, leaseID(u.key), leases.SynchronousDelete); err != nil {
		p.log.WithFields(u.fields()).WithError(err).Warn("lease not ended, it expires by itself")
	}
	return err
}

func (p *Puller) pullCRI(ctx context.Context, u *pull, credential *opsv1.RegistryCredential) error {
	_, err := p.images.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: p.spec(u), Auth: authConfig(credential),
		SandboxConfig: &runtimeapi.PodSandboxConfig{Labels: u.req.GetSandboxLabels(), Annotations: u.req.GetSandboxAnnotations()},
	})
	return err
}

// sight is what is seen of an image while it is pulled. Its user is track once that runs.
type sight struct {
	search *search
	m      *manifest // nil: not known yet
	done   []int64   // of each layer
	before int64     // bytes that were there before
	// present is how many of the lowest layers are there as snapshots.
	present int
	// refused is why the pull is ended.
	refused error
}

// sighted takes in what the image consists of. The error says that it does not fit.
func (p *Puller) sighted(ctx context.Context, u *pull, w *sight, m *manifest) error {
	done := make([]int64, len(m.layers))
	snapshotter := p.snapshotter(ctx, u.req.GetRuntimeHandler())
	present := p.store.unpacked(ctx, snapshotter, m.chain)
	if present > 0 {
		if err := p.store.keepSnapshot(ctx, w.search.lease, snapshotter, m.chain[present-1]); err != nil && ctx.Err() == nil {
			p.log.WithFields(u.fields()).WithError(err).Debug("snapshots not kept")
		}
	}
	for i := range present {
		done[i] = m.layers[i].Size
	}
	if err := p.store.fetched(ctx, m.layers, done); err != nil {
		return fmt.Errorf("what is there of the image: %w", err)
	}
	w.m, w.done, w.present, w.before = m, done, present, w.search.before(ctx, m, present, done)
	return p.checkDisk(ctx, u, m.total-sum(done))
}

// track shows the progress until ended is closed. It ends a pull that does not fit on the disk.
func (p *Puller) track(ctx context.Context, u *pull, w *sight, stop context.CancelFunc, ended <-chan struct{}) {
	log := p.log.WithFields(u.fields())
	var pace *speed
	last := int64(0)
	began := time.Now()
	for {
		every := lookEvery
		if time.Since(began) > lookClosely {
			every = progressEvery
		}
		if w.m == nil {
			if err := p.seek(ctx, u, w); err != nil && w.m != nil {
				w.refused = err
				stop()
			} else if err != nil && ctx.Err() == nil {
				log.WithError(err).Debug("manifest not known")
			}
		} else if pace != nil {
			if err := p.store.fetched(ctx, w.m.layers, w.done); err != nil && ctx.Err() == nil {
				log.WithError(err).Debug("progress not known")
			}
		}
		if w.m != nil {
			every = progressEvery
			if pace == nil {
				last = w.before
				pace = newSpeed(last, began)
			}
			now := sum(w.done)
			p.show(u, w, max(0, now-last), pace.add(now, time.Now()))
			last = now
		}
		timer := time.NewTimer(every)
		select {
		case <-timer.C:
		case <-ended:
			timer.Stop()
			p.lastLook(ctx, u, w, last)
			return
		}
	}
}

// seek finds what the image consists of in what the runtime has fetched.
func (p *Puller) seek(ctx context.Context, u *pull, w *sight) error {
	m, err := w.search.look(ctx)
	if err != nil || m == nil {
		return err
	}
	return p.sighted(ctx, u, w, m)
}

// lastLook counts what came since the one before, also of an attempt that has been cut off.
func (p *Puller) lastLook(ctx context.Context, u *pull, w *sight, last int64) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if w.m == nil {
		if _ = p.seek(ctx, u, w); w.m == nil {
			return
		}
		last = w.before
	} else if p.store.fetched(ctx, w.m.layers, w.done) != nil {
		return
	}
	p.show(u, w, max(0, sum(w.done)-last), 0)
}

func (p *Puller) show(u *pull, w *sight, fetched, rate int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.op.GetFinishTime() != nil {
		return
	}
	u.op.LastFailure = nil
	u.op.BytesDone, u.op.BytesTotal, u.op.BytesPerSecond = sum(w.done), w.m.total, rate
	u.op.BytesFetched += fetched
	p.metrics.bytes.Add(float64(fetched))
	u.op.Phase = opsv1.PullPhase_PULL_FETCHING
	if u.op.BytesDone == w.m.total {
		u.op.Phase = opsv1.PullPhase_PULL_UNPACKING
	}
	u.op.Layers = layerProgress(w.m.layers, w.done)
	u.notifyLocked()
}

func layerProgress(layers []ocispec.Descriptor, done []int64) []*opsv1.LayerProgress {
	out := make([]*opsv1.LayerProgress, len(layers))
	for i, l := range layers {
		out[i] = &opsv1.LayerProgress{Digest: l.Digest.String(), BytesDone: done[i], BytesTotal: l.Size}
	}
	return out
}

// succeed ends the operation with the image that is there, and pins it. One that cannot run here is no success.
func (p *Puller) succeed(ctx context.Context, u *pull, image *runtimeapi.Image, reason string) error {
	if err := p.checkPlatform(ctx, u); err != nil {
		return err
	}
	message, notPinned := "", ""
	keep := u.req.GetPinFor().AsDuration()
	if keep > 0 {
		if notPinned = p.checkPins(ctx, u, image); notPinned != "" {
			keep = 0
		}
	}
	if keep > 0 {
		switch err := p.addPin(ctx, image, u.named.String(), u.req.GetOwner(), time.Now().Add(keep)); {
		case errors.Is(err, errNotOurs):
			message = err.Error()
		case err != nil && unavailable(err):
			notPinned = "the runtime has no way to"
		case err != nil:
			return fmt.Errorf("pinning: %w", err)
		}
	}
	if err := p.store.dropLease(context.WithoutCancel(ctx), leaseID(u.key)); err != nil && !unavailable(err) {
		p.log.WithFields(u.fields()).WithError(err).Warn("lease not ended, it expires by itself")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	u.op.ImageId, u.op.NotPinned = image.GetId(), notPinned
	if notPinned != "" {
		message = "not pinned: " + notPinned
	}
	if u.op.GetBytesFetched() > 0 {
		reason = opsv1.PullReasonPulled // kubelet may have done the rest
	}
	if u.op.GetBytesTotal() > 0 {
		u.op.BytesDone = u.op.GetBytesTotal()
		for _, l := range u.op.GetLayers() {
			l.BytesDone = l.GetBytesTotal()
		}
	}
	p.finishLocked(u, opsv1.PullPhase_PULL_SUCCEEDED, reason, message)
	return nil
}

func sum(n []int64) int64 {
	total := int64(0)
	for _, v := range n {
		total += v
	}
	return total
}

// rateWindow is what the rate is the mean of.
const rateWindow = 3 * time.Second

// speed tells the current rate.
type speed struct {
	at   []time.Time
	seen []int64
}

func newSpeed(n int64, at time.Time) *speed { return &speed{at: []time.Time{at}, seen: []int64{n}} }

// add takes what there is now and returns bytes per second.
func (r *speed) add(n int64, at time.Time) int64 {
	r.at, r.seen = append(r.at, at), append(r.seen, n)
	old := slices.IndexFunc(r.at, func(t time.Time) bool { return at.Sub(t) <= rateWindow })
	r.at, r.seen = r.at[old:], r.seen[old:]
	took := at.Sub(r.at[0])
	if took <= 0 {
		return 0
	}
	return max(0, int64(float64(n-r.seen[0])/took.Seconds()))
}
