// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

// progressEvery is how often the content store is asked how far a pull is. The question takes a millisecond.
const progressEvery = 250 * time.Millisecond

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
			return p.succeed(ctx, u, got, ReasonPresent)
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
			return p.succeed(ctx, u, got, ReasonPulled)
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
	image := u.named.String()
	p.leasing.Lock()
	leased, err := p.store.lease(ctx, leaseID(u.key))
	p.leasing.Unlock()
	if err != nil {
		if !unavailable(err) {
			return err
		}
		return p.pullCRI(ctx, u, credential) // not containerd
	}
	limit := p.limitOf(u)
	var m *manifest
	limiter := newLimiter(limit)
	u.limiter.Store(limiter)
	r, err := newRemote(leased, p.hostsDir, image, credential, limiter)
	defer r.close()
	if err == nil {
		m, err = r.manifest(leased)
	}
	if err != nil {
		host, _ := registryOf(u.named)
		f := explain(err, host)
		if ctx.Err() != nil || f.reason == ReasonTooManyRequests {
			return f
		}
		// The runtime's own configuration is what counts, and its word on what is wrong.
		log := p.log.WithFields(u.fields()).WithField("reason", f.reason).WithField("error", f.message)
		if limit > 0 && !f.credentials {
			log.Warn("image not looked up here, leaving it to the runtime, which knows no speed limit")
		} else {
			log.Debug("image not looked up here, leaving it to the runtime")
		}
		if err := p.checkDisk(ctx, unknown); err != nil {
			return err
		}
		return p.pullCRI(leased, u, credential)
	}
	done := make([]int64, len(m.layers))
	if err := p.store.fetched(leased, m.layers, done); err != nil {
		return err
	}
	have := sum(done)
	if err := p.checkDisk(ctx, m.total-have); err != nil {
		return err
	}
	ended := make(chan struct{})
	tracked := make(chan struct{})
	go func() { // ends with ended
		defer close(tracked)
		guard.Do(p.log.WithFields(u.fields()), func() { p.track(leased, u, m, done, ended) })
	}()
	defer func() {
		close(ended)
		<-tracked
	}()
	if limiter != nil {
		if err := r.layers(leased, p.log.WithFields(u.fields()), p.store.content, m.layers, limiter); err != nil {
			return err
		}
	}
	return p.pullCRI(leased, u, credential)
}

func (p *Puller) pullCRI(ctx context.Context, u *pull, credential *opsv1.RegistryCredential) error {
	_, err := p.images.PullImage(ctx, &runtimeapi.PullImageRequest{
		Image: p.spec(u), Auth: authConfig(credential),
		SandboxConfig: &runtimeapi.PodSandboxConfig{Labels: u.req.GetSandboxLabels(), Annotations: u.req.GetSandboxAnnotations()},
	})
	return err
}

// track shows the progress until ended is closed.
func (p *Puller) track(ctx context.Context, u *pull, m *manifest, done []int64, ended <-chan struct{}) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	rate := newSpeed(sum(done), time.Now())
	last := sum(done)
	for {
		now := sum(done)
		p.show(u, m, done, max(0, now-last), rate.add(now, time.Now()))
		last = now
		select {
		case <-tick.C:
		case <-ended:
			p.lastLook(ctx, u, m, done)
			return
		}
		if err := p.store.fetched(ctx, m.layers, done); err != nil && ctx.Err() == nil {
			p.log.WithFields(u.fields()).WithError(err).Debug("progress not known")
		}
	}
}

// lastLook counts what came since the one before, also of an attempt that has been cut off.
func (p *Puller) lastLook(ctx context.Context, u *pull, m *manifest, done []int64) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	last := sum(done)
	if p.store.fetched(ctx, m.layers, done) == nil {
		p.show(u, m, done, max(0, sum(done)-last), 0)
	}
}

func (p *Puller) show(u *pull, m *manifest, done []int64, fetched, rate int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.op.GetFinishTime() != nil {
		return
	}
	u.op.BytesDone, u.op.BytesTotal, u.op.BytesPerSecond = sum(done), m.total, rate
	u.op.BytesFetched += fetched
	p.metrics.bytes.Add(float64(fetched))
	u.op.Phase = opsv1.PullPhase_PULL_FETCHING
	if u.op.BytesDone == m.total {
		u.op.Phase = opsv1.PullPhase_PULL_UNPACKING
	}
	u.op.Layers = layerProgress(m.layers, done)
	u.notifyLocked()
}

func layerProgress(layers []ocispec.Descriptor, done []int64) []*opsv1.LayerProgress {
	out := make([]*opsv1.LayerProgress, len(layers))
	for i, l := range layers {
		out[i] = &opsv1.LayerProgress{Digest: l.Digest.String(), BytesDone: done[i], BytesTotal: l.Size}
	}
	return out
}

// succeed ends the operation with the image that is there, and pins it.
func (p *Puller) succeed(ctx context.Context, u *pull, image *runtimeapi.Image, reason string) error {
	message := ""
	keep := u.req.GetPinFor().AsDuration()
	if keep > 0 {
		if full := p.checkPins(ctx, u, image); full != "" {
			keep, message = 0, "not pinned: "+full
		}
	}
	if keep > 0 {
		switch err := p.addPin(ctx, image, u.named.String(), u.req.GetOwner(), time.Now().Add(keep)); {
		case errors.Is(err, errNotOurs):
			message = err.Error()
		case err != nil && unavailable(err):
			message = "not pinned: the runtime has no way to"
		case err != nil:
			return fmt.Errorf("pinning: %w", err)
		}
	}
	if err := p.store.dropLease(context.WithoutCancel(ctx), leaseID(u.key)); err != nil && !unavailable(err) {
		p.log.WithFields(u.fields()).WithError(err).Warn("lease not ended, it expires by itself")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	u.op.ImageId = image.GetId()
	if u.op.GetBytesFetched() > 0 {
		reason = ReasonPulled // kubelet may have done the rest
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
