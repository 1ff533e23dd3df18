// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

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
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// override is what a slot has in place of the image in the pod's spec. It never changes.
type override struct {
	PodUID    string `json:"podUID"`
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Container string `json:"container"`
	// Image is what was asked for, ImageID what that was. kubelet resolves names; what a name says later does not count.
	Image   string `json:"image"`
	ImageID string `json:"imageID"`
	// SpecImage is the image in the pod's spec, to the letter.
	SpecImage string `json:"specImage"`
	// NonRoot is whether the container did not run as root before, because of its image.
	NonRoot   bool      `json:"nonRoot,omitempty"`
	Since     time.Time `json:"since"`
	Requester string    `json:"requester,omitempty"`
	Operation string    `json:"operation"`
}

func (o *override) slot() interceptors.Slot {
	return interceptors.Slot{PodUID: o.PodUID, Container: o.Container}
}

// stale reports whether the pod's spec has been patched while the proxy was not in the path: the container was made of an image that
// is neither the one nor the other.
func (o *override) stale(runs string) bool { return runs != o.Image && runs != o.SpecImage }

// specImage returns the image in the spec of a pod whose container was made of the image runs; o may be nil.
func (o *override) specImage(runs string) string {
	if o == nil || o.stale(runs) {
		return runs
	}
	return o.SpecImage
}

// Overrides are the slots whose image is not the one in the pod's spec. They are kept in the journal's file.
type Overrides struct {
	journal *journal
	img     runtimeapi.ImageServiceClient
	log     logrus.FieldLogger
	lost    prometheus.Counter

	// n is how many there are. The pass path reads only this.
	n atomic.Int32
	// removed wakes whoever looks for pods that are gone, dirty whoever writes what has changed in
	// a call of kubelet's.
	removed, dirty chan struct{}

	// writing is held while the journal is written, or an older change could come after a newer
	// one. It is taken before mu, which never is held then: kubelet's calls take mu, and a disk may
	// hang.
	writing sync.Mutex

	mu     sync.Mutex // guards all following fields
	bySlot map[interceptors.Slot]*override
	// unwritten is what the journal does not have yet; nil for an override that has ended. It goes with the next write of an
	// operation, so that a step and what it means for the slot are on disk together.
	unwritten map[interceptors.Slot]*override
}

var _ interceptors.Overrides = (*Overrides)(nil)

// openOverrides reads them. One that cannot be read is left out.
func openOverrides(j *journal, img runtimeapi.ImageServiceClient, log logrus.FieldLogger) (*Overrides, error) {
	s := &Overrides{
		journal: j, img: img, log: log, removed: make(chan struct{}, 1), dirty: make(chan struct{}, 1),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "criproxy_image_overrides_lost_total", Help: "Image overrides that ended because their image was not on the node any more.",
		}),
		bySlot: map[interceptors.Slot]*override{}, unwritten: map[interceptors.Slot]*override{},
	}
	err := j.loadOverrides(func(key string, raw []byte) {
		o := &override{}
		if err := json.Unmarshal(raw, o); err != nil || o.slot().String() != key {
			log.WithField("slot", key).Error("image override cannot be read: kubelet makes the container with the image of the pod's spec")
			return
		}
		s.bySlot[o.slot()] = o
	})
	s.n.Store(int32(len(s.bySlot)))
	return s, err
}

// Any implements [interceptors.Overrides].
func (s *Overrides) Any() bool { return s.n.Load() > 0 }

// of returns the slot's override, or nil.
func (s *Overrides) of(slot interceptors.Slot) *override {
	if !s.Any() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bySlot[slot]
}

// set makes o the slot's override, none if it is nil, and returns the one before. It is on disk with the next write.
func (s *Overrides) set(slot interceptors.Slot, o *override) (before *override) {
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

// drop ends the slot's override, on disk too unless that fails: then with the next write.
func (s *Overrides) drop(o *override) {
	s.set(o.slot(), nil)
	s.flush()
}

// end is drop for calls of kubelet's, which don't wait for the disk. If the process dies before it
// is written, what ended it ends it again: it is looked at each time that kubelet makes the
// container.
func (s *Overrides) end(o *override) {
	s.set(o.slot(), nil)
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

func (s *Overrides) flush() {
	if err := s.write(s.journal.putOverrides); err != nil {
		s.log.WithError(err).Warn("end of an image override not written; tried again with the next write")
	}
}

// write calls put with what is not on disk, by slot and with nil for what has ended. Once put returns nil it counts as written.
func (s *Overrides) write(put func(changes map[string][]byte) error) error {
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
		if later, is := s.unwritten[slot]; is && later == o { // else it has changed again meanwhile
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

// Apply implements [interceptors.Overrides]. An override whose image is gone, or whose pod's spec has got another image, ends: then
// the request stays as it is.
//
// Errors: the runtime is away, as a gRPC status.
func (s *Overrides) Apply(ctx context.Context, slot interceptors.Slot, req *runtimeapi.CreateContainerRequest) (bool, error) {
	o := s.of(slot)
	if o == nil {
		return false, nil
	}
	config := req.GetConfig()
	log := s.log.WithFields(logrus.Fields{"pod": o.Namespace + "/" + o.Pod, "container": o.Container, "image": o.Image, "specImage": o.SpecImage})
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
		return false, err // so would the creation be answered
	case err != nil || image == nil:
		log.WithError(err).Warn("image override ended: the image is not on the node any more; the container is made with the image of the pod's spec")
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

// writeEnded writes overrides that a call of kubelet's has ended, until ctx ends. What it does not
// come to goes with the next write, or with the end of the engine.
func (e *Engine) writeEnded(ctx context.Context) {
	for {
		select {
		case <-e.overrides.dirty:
			e.overrides.flush()
		case <-ctx.Done():
			return
		}
	}
}

// forgetOnRemoval ends overrides of pods that are gone when a sandbox is removed, until ctx ends. A pod may have several
// sandboxes, of which kubelet removes the older ones.
func (e *Engine) forgetOnRemoval(ctx context.Context) {
	for {
		select {
		case <-e.overrides.removed:
		case <-ctx.Done():
			return
		}
		e.forgetOverrides(ctx)
	}
}

// forgetOverrides ends overrides of pods that have no sandbox any more.
func (e *Engine) forgetOverrides(ctx context.Context) {
	// The overrides are read first: a pod that gets one after that had a sandbox at least until then.
	all := e.overrides.list()
	if len(all) == 0 {
		return
	}
	list, err := e.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		if ctx.Err() == nil {
			e.log.WithError(err).Warn("image overrides not tidied")
		}
		return
	}
	there := map[string]bool{}
	for _, sandbox := range list.GetItems() {
		there[sandbox.GetMetadata().GetUid()] = true
	}
	for _, o := range all {
		if there[o.PodUID] {
			continue
		}
		e.log.WithFields(logrus.Fields{"pod": o.Namespace + "/" + o.Pod, "container": o.Container, "image": o.Image}).Info("image override ended: the pod is gone")
		e.overrides.set(o.slot(), nil)
	}
	e.overrides.flush()
}

// list returns all, by pod and container.
func (s *Overrides) list() []*override {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*override, 0, len(s.bySlot))
	for _, o := range s.bySlot {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b *override) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.PodUID, b.PodUID), cmp.Compare(a.Container, b.Container))
	})
	return out
}

// ListOverrides implements [opsv1.OpsServer].
func (s *Server) ListOverrides(context.Context, *opsv1.ListOverridesRequest) (*opsv1.ListOverridesResponse, error) {
	resp := &opsv1.ListOverridesResponse{}
	for _, o := range s.e.overrides.list() {
		resp.Overrides = append(resp.Overrides, &opsv1.ImageOverride{
			Pod: &opsv1.PodRef{Namespace: o.Namespace, Name: o.Pod, Uid: o.PodUID}, Container: o.Container,
			Image: o.Image, ImageId: o.ImageID, SpecImage: o.SpecImage,
			Since: timestamppb.New(o.Since), Requester: o.Requester, OperationUid: o.Operation,
		})
	}
	return resp, nil
}
