// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// Options are what a [Keeper] works with. All but Pods are required.
type Options struct {
	Node       *crinode.Client
	View       *view.View
	Records    *store.Records
	Switchover *switchover.Prober
	Tokens     *Tokens
	Pods       podsapi.Pods
	// LogLinks is the directory with kubelet's symlinks to container logs.
	LogLinks string
	Log      logrus.FieldLogger
}

// Keeper finds staged containers that no journal knows, hides them and takes them away.
type Keeper struct {
	Options

	// judging is held while containers are judged; judged is set once all have been. See Judge.
	judging chan struct{}
	judged  atomic.Bool

	mu sync.Mutex // guards all following fields; taken before that of Tokens
	// settled has the tokens of the successors that have ended, by whether they have taken over, as
	// the journal knows it. incumbents has the containers that operations of the journal replace.
	settled    map[string]bool
	incumbents map[string]bool
	// decided are the tokens that judge has met.
	decided map[string]bool
	// unread has the records that this binary does not understand, left the slots in which
	// operations of such records have hidden containers.
	unread [][]byte
	left   map[view.Slot]bool
	// slots are those with strays, until Clear takes care of them.
	slots []*slot
}

// slot is a slot with containers of operations that no journal knows. They hold it until they have
// been taken care of, so that neither an operation nor a creation of kubelet's comes in between.
type slot struct {
	k      *Keeper
	at     view.Slot
	hold   *view.Claim // nil: an operation of this process has the slot, or kubelet is creating in it
	strays []*stray
	// waits is a container that is to pass its gate; nil for none.
	waits *stray
	// left has those of operations that this binary does not understand: hidden, and not taken away
	// unless kubelet wants the slot.
	left []*stray
}

// stray is a container of a slot that no journal knows.
type stray struct {
	id, token string
	pod       string // namespace/name
	labels    map[string]string
	sandbox   string
	runs      bool        // it was listed running, and what runs beside it may be masked
	claim     *view.Claim // hides it; nil if it is shown
}

// New returns a keeper that knows of no journal yet.
func New(o Options) *Keeper {
	return &Keeper{
		Options:    o,
		judging:    make(chan struct{}, 1),
		settled:    map[string]bool{},
		incumbents: map[string]bool{},
		decided:    map[string]bool{},
		left:       map[view.Slot]bool{},
	}
}

// Settled notes a successor that no operation holds back any more: what kubelet has seen must not
// vanish again. Without tookOver it has ended otherwise.
func (k *Keeper) Settled(token string, tookOver bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.settled[token] = tookOver
}

// Replaced notes a container that an unfinished operation of the journal replaces.
func (k *Keeper) Replaced(incumbent string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.incumbents[incumbent] = true
}

// LeaveAlone notes a record of the journal that this binary does not understand. The containers
// with a token in that record are not taken away.
func (k *Keeper) LeaveAlone(record []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unread = append(k.unread, record)
}

// isLeftAlone reports whether a record that this binary does not understand has the token, wherever
// in the record.
func (k *Keeper) isLeftAlone(token string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(k.unread, func(record []byte) bool { return bytes.Contains(record, []byte(token)) })
}

// Refuse returns an [*operation.Outcome] if the slot has a hidden container of an operation that
// this binary does not understand.
func (k *Keeper) Refuse(at view.Slot) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.left[at] {
		return operation.Failf(opsv1.ReasonJournalVersion, "container %q has a successor of another version of "+
			"cri-proxy waiting: install that version again, or delete the pod (the journal's operations: "+
			"cri-proxy ctl ops)", at.Container)
	}
	return nil
}

// takeSlots returns the slots that are to be taken care of.
func (k *Keeper) takeSlots() []*slot {
	k.mu.Lock()
	defer k.mu.Unlock()
	slots := k.slots
	k.slots = nil
	return slots
}

func (s *stray) fields() logrus.Fields {
	return logrus.Fields{"pod": s.pod, "container": s.labels[criclone.LabelContainer], "id": s.id}
}

// reveal shows a stray, which is none any more.
func (s *stray) reveal() {
	s.claim.Reveal()
	s.runs = false // nothing beside it is masked
}

// tokenOf returns the token of a container; empty if no operation has made it.
func tokenOf(c *runtimeapi.Container) string { return c.GetAnnotations()[view.StagedAnnotation] }
