// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yield

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

// minAge is how old a pull of kubelet's must be to be looked at. A pull of an image that is on the
// node takes milliseconds.
const minAge = 100 * time.Millisecond

// KubeletPulls are the pulls of kubelet's that are under way. Its lock is held for no time, because
// kubelet waits for it.
type KubeletPulls struct {
	mu      sync.Mutex // guards running
	running map[*KubeletPull]bool
	changed chan struct{}
}

// KubeletPull is one pull of kubelet's.
type KubeletPull struct {
	image string // empty: not known
	began time.Time
}

// NewKubeletPulls returns an empty set.
func NewKubeletPulls() *KubeletPulls {
	return &KubeletPulls{running: map[*KubeletPull]bool{}, changed: make(chan struct{}, 1)}
}

// Begin says that kubelet pulls an image, until done is called. An empty name means that the image
// is not known.
func (k *KubeletPulls) Begin(image string) (done func()) {
	pull := &KubeletPull{image: image, began: time.Now()}
	k.mu.Lock()
	k.running[pull] = true
	k.mu.Unlock()
	timer := time.AfterFunc(minAge, k.Wake)
	return func() {
		timer.Stop()
		k.mu.Lock()
		delete(k.running, pull)
		none := len(k.running) == 0
		k.mu.Unlock()
		if none {
			k.Wake()
		}
	}
}

// Changed receives when somebody is to look at the pulls.
func (k *KubeletPulls) Changed() <-chan struct{} { return k.changed }

// Wake has somebody look at the pulls.
func (k *KubeletPulls) Wake() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// Lasting returns the pulls that are old enough to be looked at, the oldest first.
func (k *KubeletPulls) Lasting(now time.Time) []*KubeletPull {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []*KubeletPull
	for pull := range k.running {
		if now.Sub(pull.began) >= minAge {
			all = append(all, pull)
		}
	}
	slices.SortFunc(all, func(a, b *KubeletPull) int {
		return cmp.Or(a.began.Compare(b.began), strings.Compare(a.image, b.image))
	})
	return all
}

// Since returns when the oldest pull began; zero if that is not known. pulls are as
// [KubeletPulls.Lasting] returns them, at least one.
func Since(pulls []*KubeletPull) time.Time {
	if slices.ContainsFunc(pulls, func(k *KubeletPull) bool { return k.image == "" }) { // of the process before
		return time.Time{}
	}
	return pulls[0].began
}

// Names lists the images of the pulls for the node's log. The status of a pull must not have it:
// its reader may not be allowed to know what other namespaces run.
func Names(pulls []*KubeletPull) string {
	var images []string
	for _, pull := range pulls {
		if pull.image != "" && !slices.Contains(images, pull.image) {
			images = append(images, pull.image)
		}
	}
	return cmp.Or(strings.Join(images, ", "), "an image")
}
