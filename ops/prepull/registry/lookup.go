// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/distribution/reference"
	"golang.org/x/time/rate"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/imagestore"
)

const (
	// LookUpTimeout bounds what an attempt spends on asking the registry itself before it asks the
	// runtime, which may have ways to the registry that are not ours.
	LookUpTimeout = 5 * time.Second
	// SilenceAge is how long a registry that has not answered at all is not asked again, whatever
	// the image. A registry that has answered anything may be slow with that image only.
	SilenceAge = 5 * time.Minute
	// silenceAfter is how long it must have taken: a registry that refuses at once costs nothing.
	silenceAfter = time.Second
)

// errLookUp ends a look-up that takes too long.
var errLookUp = errors.New("the registry takes too long")

// LookUp looks up images in registries. It remembers registries that do not answer, for all images
// and callers.
type LookUp struct {
	hosts Hosts

	mu     sync.Mutex // guards silent
	silent map[string]silence
}

// silence is why a registry is not asked, and until when.
type silence struct {
	until time.Time
	why   string
}

// NewLookUp returns a LookUp that reaches registries as hosts says.
func NewLookUp(hosts Hosts) *LookUp { return &LookUp{hosts: hosts, silent: map[string]silence{}} }

// Manifest asks the registry for the image and fetches its manifest and config into the content
// store, where the runtime finds them. A failure says nothing about the image, only that it cannot
// be looked up from here. The caller closes the image, which is nil with a failure.
func (l *LookUp) Manifest(
	ctx context.Context, named reference.Named, credential *opsv1.RegistryCredential, limit *rate.Limiter,
	store content.Store,
) (*Image, *imagestore.Manifest, *Failure) {
	host, _ := HostOf(named)
	if why := l.silence(host); why != "" {
		return nil, nil, &Failure{Reason: opsv1.PullReasonRegistryUnavailable, Message: why}
	}
	began, silent := time.Now(), false
	r, err := NewImage(ctx, l.hosts, named.String(), credential, limit)
	if err == nil {
		bounded, cancel := context.WithTimeoutCause(ctx, LookUpTimeout, errLookUp)
		defer cancel()
		var m *imagestore.Manifest
		if err = r.Resolve(bounded); err == nil {
			m, err = r.Manifest(bounded, store)
		}
		if err == nil {
			return r, m, nil
		}
		r.Close()
		silent = !r.Answered()
		if errors.Is(context.Cause(bounded), errLookUp) {
			err = &Failure{Reason: opsv1.PullReasonTimeout, Message: fmt.Sprintf("registry %s has not told cri-proxy "+
				"the image's manifest within %s: has the runtime a proxy or a mirror that cri-proxy does not know?",
				host, LookUpTimeout)}
		}
	}
	f := Explain(err, host)
	trouble := f.Reason == opsv1.PullReasonTimeout || f.Reason == opsv1.PullReasonRegistryUnavailable
	if silent && trouble && ctx.Err() == nil && time.Since(began) >= silenceAfter {
		// The text in parentheses names the image, which may be somebody else's business.
		why, _, _ := strings.Cut(f.Message, " (")
		l.remember(host, why)
	}
	return nil, nil, f
}

// silence returns why the registry did not answer lately; empty if it is to be asked.
func (l *LookUp) silence(host string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.silent[host]; time.Now().Before(s.until) {
		return s.why
	}
	return ""
}

func (l *LookUp) remember(host, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for h, s := range l.silent {
		if !now.Before(s.until) {
			delete(l.silent, h)
		}
	}
	l.silent[host] = silence{now.Add(SilenceAge), why}
}
