// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// Override is the image that a slot has instead of the one in the pod's spec. It never changes.
type Override struct {
	PodUID    string `json:"podUID"`
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Container string `json:"container"`
	// Image is the name that was asked for, ImageID the image that it named then. What the name
	// means later does not count.
	Image   string `json:"image"`
	ImageID string `json:"imageID"`
	// SpecImage is the image in the pod's spec, to the letter.
	SpecImage string `json:"specImage"`
	// NonRoot is whether the image made the container run as another user than root before.
	NonRoot   bool      `json:"nonRoot,omitempty"`
	Since     time.Time `json:"since"`
	Requester string    `json:"requester,omitempty"`
	Operation string    `json:"operation"`
}

// Slot is the slot that has the override.
func (o *Override) Slot() view.Slot {
	return view.Slot{PodUID: o.PodUID, Container: o.Container}
}

// Stale reports whether the pod's spec has been patched while the proxy was not in the path: the
// container runs an image that is neither the override's nor the one that the spec had.
func (o *Override) Stale(runs string) bool { return runs != o.Image && runs != o.SpecImage }

// SpecImageOf returns the image in the spec of a pod whose container runs the given image; o may be
// nil.
func (o *Override) SpecImageOf(runs string) string {
	if o == nil || o.Stale(runs) {
		return runs
	}
	return o.SpecImage
}

// Overrides are the slots whose image is not the one in the pod's spec. The journal's file has
// them.
type Overrides struct {
	journal *Journal
	img     runtimeapi.ImageServiceClient
	log     logrus.FieldLogger
	lost    prometheus.Counter

	// n is the number of overrides. Calls that pass through read only n.
	n atomic.Int32
	// removed has an element when a sandbox has been removed, dirty when a call of kubelet's has
	// changed an override.
	removed, dirty chan struct{}

	// writing is held while the journal is written, so that an older change never follows a newer
	// one. It is taken before mu. mu is not held during the write: kubelet's calls take mu, and a
	// disk may hang.
	writing sync.Mutex

	mu     sync.Mutex // guards all following fields
	bySlot map[view.Slot]*Override
	// unwritten is what the journal does not have yet; nil for an override that has ended. The next
	// write of an operation takes it along: a step and what it means for the slot are on disk
	// together.
	unwritten map[view.Slot]*Override
}

var _ interceptors.Overrides = (*Overrides)(nil)

// OpenOverrides reads the overrides of the journal. It leaves out an override that cannot be read.
func OpenOverrides(j *Journal, img runtimeapi.ImageServiceClient, log logrus.FieldLogger) (*Overrides, error) {
	s := &Overrides{
		journal: j, img: img, log: log, removed: make(chan struct{}, 1), dirty: make(chan struct{}, 1),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_image_overrides_lost_total",
			Help: "Image overrides that ended because their image was not on the node any more.",
		}),
		bySlot: map[view.Slot]*Override{}, unwritten: map[view.Slot]*Override{},
	}
	err := j.loadOverrides(func(key string, raw []byte) {
		o := &Override{}
		if err := json.Unmarshal(raw, o); err != nil || o.Slot().String() != key {
			log.WithField("slot", key).Error("image override cannot be read: " +
				"kubelet makes the container with the image of the pod's spec")
			return
		}
		s.bySlot[o.Slot()] = o
	})
	s.n.Store(int32(len(s.bySlot)))
	return s, err
}

// Any implements [interceptors.Overrides].
func (s *Overrides) Any() bool { return s.n.Load() > 0 }

// Len returns the number of overrides.
func (s *Overrides) Len() int { return int(s.n.Load()) }

// Lost counts the overrides that have ended because their image was gone.
func (s *Overrides) Lost() prometheus.Collector { return s.lost }

// Removed gets an element when a sandbox has been removed.
func (s *Overrides) Removed() <-chan struct{} { return s.removed }

// Dirty gets an element when a call of kubelet's has changed an override; see [Overrides.Flush].
func (s *Overrides) Dirty() <-chan struct{} { return s.dirty }

// Of returns the slot's override, or nil.
func (s *Overrides) Of(slot view.Slot) *Override {
	if !s.Any() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bySlot[slot]
}

// Set makes o the slot's override, none if it is nil, and returns the one before. The change is on
// disk with the next write.
func (s *Overrides) Set(slot view.Slot, o *Override) (before *Override) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before = s.bySlot[slot]
	if o == before {
		return before
	}
	s.unwritten[slot] = o
	if o == nil {
		delete(s.bySlot, slot)
	} else {
		s.bySlot[slot] = o
	}
	s.n.Store(int32(len(s.bySlot)))
	return before
}

// Drop ends the slot's override, on disk too. If that fails, the next write does it.
func (s *Overrides) Drop(o *Override) {
	s.Set(o.Slot(), nil)
	s.Flush()
}

// end ends an override in a call of kubelet's, which does not wait for the disk. If the process
// dies before the end is written, the next CreateContainer of kubelet's in the slot ends it again.
func (s *Overrides) end(o *Override) {
	s.Set(o.Slot(), nil)
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// Flush writes what is not on disk.
func (s *Overrides) Flush() {
	if err := s.Write(s.journal.putOverrides); err != nil {
		s.log.WithError(err).Warn("end of an image override not written; tried again with the next write")
	}
}

// Write calls put with the changes that are not on disk, by slot; nil means that the override has
// ended. Once put returns nil the changes count as written.
func (s *Overrides) Write(put func(changes map[string][]byte) error) error {
	if s.written() {
		return put(nil)
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	now := maps.Clone(s.unwritten)
	s.mu.Unlock()
	changes := make(map[string][]byte, len(now))
	for slot, o := range now {
		if o == nil {
			changes[slot.String()] = nil
			continue
		}
		raw, err := json.Marshal(o)
		if err != nil {
			return fmt.Errorf("encoding override of %s: %w", slot, err)
		}
		changes[slot.String()] = raw
	}
	if err := put(changes); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for slot, o := range now {
		if later, is := s.unwritten[slot]; is && later == o { // else the slot has changed again meanwhile
			delete(s.unwritten, slot)
		}
	}
	return nil
}

// written reports whether all is on disk.
func (s *Overrides) written() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.unwritten) == 0
}

// Apply implements [interceptors.Overrides]. An override ends if its image is gone or the pod's
// spec has another image; the request then stays as it is.
//
// Errors: the runtime is away, as a gRPC status.
func (s *Overrides) Apply(
	ctx context.Context, slot view.Slot, req *runtimeapi.CreateContainerRequest,
) (bool, error) {
	o := s.Of(slot)
	if o == nil {
		return false, nil
	}
	config := req.GetConfig()
	log := s.log.WithFields(logrus.Fields{
		"pod": o.Namespace + "/" + o.Pod, "container": o.Container, "image": o.Image, "specImage": o.SpecImage,
	})
	if asked := config.GetImage().GetUserSpecifiedImage(); asked != o.SpecImage {
		log.WithField("asked", asked).Info("image override ended: the pod's spec has another image")
		s.end(o)
		return false, nil
	}
	image, err := s.image(ctx, o.ImageID)
	var spec *runtimeapi.Image
	if err == nil && image != nil {
		spec, err = s.image(ctx, config.GetImage().GetImage())
	}
	switch code := status.Code(err); {
	case code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.Canceled:
		return false, err // the runtime would answer the creation the same
	case err != nil || image == nil:
		log.WithError(err).Warn("image override ended: the image is not on the node any more; " +
			"the container is made with the image of the pod's spec")
		s.lost.Inc()
		s.end(o)
		return false, nil
	}
	criclone.SetImage(config, o.Image, image.GetId())
	criclone.AdoptImageUser(config, spec, image)
	log.Info("kubelet makes the container anew, with the image that overrides the one in the pod's spec")
	return true, nil
}

// image returns nil if the image is not on the node.
func (s *Overrides) image(ctx context.Context, id string) (*runtimeapi.Image, error) {
	st, err := s.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: id}})
	return st.GetImage(), err
}

// SandboxRemoved implements [interceptors.Overrides].
func (s *Overrides) SandboxRemoved() {
	select {
	case s.removed <- struct{}{}:
	default:
	}
}

// List returns all overrides, by pod and container.
func (s *Overrides) List() []*Override {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Override, 0, len(s.bySlot))
	for _, o := range s.bySlot {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b *Override) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod),
			cmp.Compare(a.PodUID, b.PodUID), cmp.Compare(a.Container, b.Container))
	})
	return out
}
