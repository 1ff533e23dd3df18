// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// heldEvents bounds the events that one stream holds back or has released but not sent.
// A swap makes three (created, started, stopped); this is room for all slots of a busy node.
// Beyond it the oldest are dropped: kubelet takes events as hints and relists every second.
const heldEvents = 1024

// getContainerEvents keeps events of hidden containers, and the stop of a masked one,
// back until the reveal.
func (d *Director) getContainerEvents(ctx context.Context, _ string, raw []byte) ([]byte, proxy.StreamFilter, error) {
	f := &eventFilter{view: d.view, did: decidedIn(ctx), extra: make(chan []byte, heldEvents)}
	d.view.mu.Lock()
	d.view.streams[f] = struct{}{}
	d.view.mu.Unlock()
	return raw, f, nil
}

// eventFilter is the filter of one GetContainerEvents stream.
type eventFilter struct {
	view  *View
	did   *decided
	extra chan []byte
	held  []heldEvent // guarded by view.mu
}

type heldEvent struct {
	claim     *Claim
	container string
	msg       []byte
}

// Message implements [proxy.StreamFilter].
func (f *eventFilter) Message(msg []byte) ([][]byte, error) {
	if !f.view.Active() && !f.view.Guarded() && f.view.starts.Load() == 0 {
		return [][]byte{msg}, nil
	}
	m, err := decode(msg, &runtimeapi.ContainerEventResponse{})
	if err != nil {
		return nil, err
	}
	if f.hold(m, msg) {
		f.did.add(didHold)
		return nil, nil
	}
	look := f.view.look(f.did)
	defer look.end()
	m.ContainersStatuses = look.showStatuses(m.ContainersStatuses)
	b, err := encode(m)
	if err != nil {
		return nil, err
	}
	return [][]byte{b}, nil
}

// hold keeps the event if it is one that kubelet must not see yet.
func (f *eventFilter) hold(m *runtimeapi.ContainerEventResponse, msg []byte) bool {
	var annotations map[string]string
	for _, s := range m.GetContainersStatuses() {
		if s.GetId() == m.GetContainerId() {
			annotations = s.GetAnnotations()
		}
	}
	v := f.view
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.tokens[annotations[StagedAnnotation]]
	if c == nil && v.suspectLocked(annotations[StagedAnnotation]) {
		return true // dropped: should it ever be shown, kubelet finds it in a list
	}
	if c == nil {
		c = v.ids[m.GetContainerId()]
		stop := m.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
		if c == nil || !c.speaking || (c.incumbent == m.GetContainerId() && !stop) {
			return false
		}
	}
	if len(f.held) == heldEvents {
		f.held = f.held[1:]
	}
	f.held = append(f.held, heldEvent{claim: c, container: m.GetContainerId(), msg: append([]byte(nil), msg...)})
	return true
}

// settleLocked releases what was held for the claim; events of the successor only
// if it is shown. The caller holds view.mu.
func (f *eventFilter) settleLocked(c *Claim, successor string, show bool) {
	rest := f.held[:0]
	for _, h := range f.held {
		switch {
		case h.claim != c:
			rest = append(rest, h)
		case !show && h.container != c.incumbent, show && successor != "" && h.container != c.incumbent && h.container != successor:
			// of a container that kubelet never sees
		default:
			select {
			case f.extra <- f.view.showHeldLocked(h.msg):
			default: // see heldEvents
			}
		}
	}
	f.held = rest
}

// showHeldLocked returns an event that was held back as it is to be shown now: it tells of all containers of the pod, of which others
// may be hidden or masked still, and of starts that were not known then. The caller holds v.mu.
func (v *View) showHeldLocked(msg []byte) []byte {
	m, err := decode(msg, &runtimeapi.ContainerEventResponse{})
	if err != nil {
		return msg // it was decoded when it came
	}
	m.ContainersStatuses = without(m.ContainersStatuses, func(s *runtimeapi.ContainerStatus) bool {
		how := v.verdictLocked(s.GetId())
		if token := s.GetAnnotations()[StagedAnnotation]; v.tokens[token] != nil || v.suspectLocked(token) {
			how = hidden
		}
		if how == masked {
			showRunning(s)
		}
		v.correctLocked(s)
		return how == hidden
	})
	b, err := encode(m)
	if err != nil {
		return msg
	}
	return b
}

// Extra implements [proxy.StreamFilter].
func (f *eventFilter) Extra() <-chan []byte { return f.extra }

// Close implements [proxy.StreamFilter].
func (f *eventFilter) Close() {
	f.view.mu.Lock()
	defer f.view.mu.Unlock()
	delete(f.view.streams, f)
}
