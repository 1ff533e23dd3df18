// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// lookupPatience bounds what an attempt spends on asking the registry itself before it asks the runtime, which may have
	// ways to the registry that are not ours.
	lookupPatience = 5 * time.Second
	// lookupMemory is how long a registry that has not answered at all is not asked again, for whatever image, and lookupSlow how
	// long it must have taken: one that refuses at once costs nothing. One that has answered anything may be slow with that image only.
	lookupMemory = 5 * time.Minute
	lookupSlow   = time.Second
	// lookFirst is the room below which an image is looked up before the runtime is asked to pull, in compressed bytes. With more, what
	// the runtime fetches until its manifest has been seen and the pull is ended fills no disk.
	lookFirst = 1 << 30
)

// errLookup ends a look-up that takes too long.
var errLookup = errors.New("the registry takes too long")

// unreached remembers registries that were not reached, for all images and whoever wants them. The zero value is ready.
type unreached struct {
	mu    sync.Mutex // guards all following fields
	hosts map[string]silence
}

type silence struct {
	until time.Time
	why   string
}

// last returns why the host was not reached lately, nothing if it is to be asked.
func (n *unreached) last(host string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.hosts[host]; time.Now().Before(s.until) {
		return s.why
	}
	return ""
}

func (n *unreached) remember(host, why string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	for h, s := range n.hosts {
		if !now.Before(s.until) {
			delete(n.hosts, h)
		}
	}
	if n.hosts == nil {
		n.hosts = map[string]silence{}
	}
	n.hosts[host] = silence{now.Add(lookupMemory), why}
}

// lookUp asks the registry for the image, and brings its manifest and config into the content store, where the runtime finds them. An error
// says nothing about the image, only that it cannot be looked up from here. The caller closes the remote, which is nil with an error.
func (p *Puller) lookUp(ctx context.Context, u *pull, credential *opsv1.RegistryCredential, limit *rate.Limiter) (*remote, *manifest, *failure) {
	host, _ := registryOf(u.named)
	if why := p.unreached.last(host); why != "" {
		return nil, nil, &failure{reason: opsv1.PullReasonRegistryUnavailable, message: why}
	}
	began, silent := time.Now(), false
	r, err := newRemote(ctx, p.hosts, u.named.String(), credential, limit)
	if err == nil {
		patient, cancel := context.WithTimeoutCause(ctx, lookupPatience, errLookup)
		defer cancel()
		var m *manifest
		if err = r.resolve(patient); err == nil {
			m, err = r.manifest(patient, p.store.content)
		}
		if err == nil {
			return r, m, nil
		}
		r.close()
		silent = !r.answered.Load()
		if errors.Is(context.Cause(patient), errLookup) {
			err = &failure{reason: opsv1.PullReasonTimeout, message: fmt.Sprintf(
				"registry %s has not told cri-proxy the image's manifest within %s: has the runtime a proxy or a mirror that cri-proxy does not know?", host, lookupPatience)}
		}
	}
	f := explain(err, host)
	trouble := f.reason == opsv1.PullReasonTimeout || f.reason == opsv1.PullReasonRegistryUnavailable
	if silent && trouble && ctx.Err() == nil && time.Since(began) >= lookupSlow {
		// What is in parentheses names the image, which may be somebody else's business.
		why, _, _ := strings.Cut(f.message, " (")
		p.unreached.remember(host, why)
	}
	return nil, nil, f
}

// withoutLimit says in the operation that its speed limit is not kept, and why.
func (p *Puller) withoutLimit(u *pull, limit int64, why string) {
	p.log.WithFields(u.fields()).WithField("error", why).Warn("pulling without the speed limit: the runtime knows none")
	p.mu.Lock()
	defer p.mu.Unlock()
	u.unlimited, u.unlimitedFrom = fmt.Sprintf("without the speed limit of %s/s: %s", bytesText(limit), why), u.op.GetBytesFetched()
	if u.op.GetFinishTime() == nil {
		u.op.Message, u.op.LimitNotKept = "pulling "+u.unlimited, u.unlimited
		u.notifyLocked()
	}
}

// forgetUnlimited takes that back when nothing has come meanwhile: the next try may keep the limit.
func (p *Puller) forgetUnlimited(u *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.unlimited != "" && u.op.GetBytesFetched() == u.unlimitedFrom {
		u.unlimited, u.op.Message, u.op.LimitNotKept = "", "", ""
	}
}

// endLocked adds to the message of a finished operation that its speed limit was not kept. The caller holds Puller.mu.
func (u *pull) endLocked(succeeded bool, message string) string {
	if u.unlimited == "" || !succeeded && u.op.GetBytesFetched() == u.unlimitedFrom {
		u.op.LimitNotKept = ""
		return message
	}
	u.op.LimitNotKept = u.unlimited
	switch {
	case !succeeded:
		return message + "; tried " + u.unlimited
	case message == "":
		return "pulled " + u.unlimited
	default:
		return message + "; pulled " + u.unlimited
	}
}
