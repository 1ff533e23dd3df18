// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// answers takes the calls whose answers tell of containers, and shows those as the view says.
type answers struct{ view *view.View }

// snapshot is how one call sees the containers. It notes what is decided about the call's answer.
type snapshot struct {
	*view.Snapshot
	starts *view.Starts
	did    *decided
}

// snapshot begins the call of ctx. End must be called when it has been answered.
func (a *answers) snapshot(ctx context.Context) *snapshot { return a.snapshotFor(decidedIn(ctx)) }

func (a *answers) snapshotFor(did *decided) *snapshot {
	return &snapshot{Snapshot: a.view.Snapshot(), starts: a.view.Starts, did: did}
}

// judge returns how the container is shown in this call's answer. annotations may be nil where the
// answer has none.
func (s *snapshot) judge(id string, annotations map[string]string) view.Verdict {
	how := s.Judge(id, annotations)
	switch how {
	case view.Hidden:
		s.did.add(didHide)
	case view.Masked:
		s.did.add(didMask)
	}
	return how
}

// correct puts the start that is to be shown into the status of a container that is shown, and
// reports whether that changed the status.
func (s *snapshot) correct(st *runtimeapi.ContainerStatus) bool {
	changed := s.starts.Correct(st)
	if changed {
		s.did.add(didCorrect)
	}
	return changed
}

// messageFilter is a [proxy.StreamFilter] that changes message by message.
type messageFilter struct {
	snapshot *snapshot
	// always has change called even if the snapshot is blank.
	always bool
	// change returns the message to send instead, nil for none.
	change func(msg []byte) ([]byte, error)
}

// Message implements [proxy.StreamFilter].
func (f *messageFilter) Message(msg []byte) ([][]byte, error) {
	if !f.always && f.snapshot.Blank() {
		return [][]byte{msg}, nil
	}
	b, err := f.change(msg)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, nil
	}
	return [][]byte{b}, nil
}

// Extra implements [proxy.StreamFilter].
func (f *messageFilter) Extra() <-chan []byte { return nil }

// Close implements [proxy.StreamFilter].
func (f *messageFilter) Close() { f.snapshot.End() }
