// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxEvents bounds the events that one stream holds back or has released but not sent. A switch
// makes three (created, started, stopped); this is room for all slots of a busy node. Beyond it the
// oldest are dropped: kubelet takes events as hints and relists every second.
const maxEvents = 1024

// Buffer holds back the events of one stream that kubelet must not see yet.
type Buffer struct {
	visibility *Visibility
	show       func(msg []byte, now Locked) []byte
	released   chan []byte
	held       []heldEvent // guarded by visibility.mu
}

type heldEvent struct {
	claim     *Claim
	container string
	msg       []byte
}

// Locked is what a view shows at the moment at which it asks. It is valid only until the function
// that got it returns, and that function must not call other methods of the view: the view is
// locked.
type Locked struct{ visibility *Visibility }

// Verdict returns how the container is shown. token is its [StagedAnnotation], or "".
func (l Locked) Verdict(id, token string) Verdict {
	v := l.visibility
	if v.tokens[token] != nil || v.suspectLocked(token) {
		return Hidden
	}
	return v.verdictLocked(id)
}

// Correct is [Starts.Correct].
func (l Locked) Correct(s *runtimeapi.ContainerStatus) { l.visibility.starts.correctLocked(s) }

// Subscribe begins a stream of events. show returns an event that was held back as it is to be
// shown when it is released. [Buffer.Close] must be called when the stream is over.
func (v *Visibility) Subscribe(show func(msg []byte, now Locked) []byte) *Buffer {
	b := &Buffer{visibility: v, show: show, released: make(chan []byte, maxEvents)}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.buffers[b] = struct{}{}
	return b
}

// Hold keeps the event if kubelet must not see it yet, and reports whether it did. token is the
// [StagedAnnotation] of the container of which the event tells, stopped says that the event tells
// of its end.
func (b *Buffer) Hold(container, token string, stopped bool, msg []byte) bool {
	v := b.visibility
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.tokens[token]
	if c == nil && v.suspectLocked(token) {
		return true // dropped: should it ever be shown, kubelet finds it in a list
	}
	if c == nil {
		c = v.ids[container]
		if c == nil || !c.active || (c.incumbent == container && !stopped) {
			return false
		}
	}
	if len(b.held) == maxEvents {
		b.held = b.held[1:]
	}
	b.held = append(b.held, heldEvent{claim: c, container: container, msg: append([]byte(nil), msg...)})
	return true
}

// settleLocked releases what was held for the claim; events of the successor only if it is shown.
func (b *Buffer) settleLocked(c *Claim, successor string, show bool) {
	rest := b.held[:0]
	for _, h := range b.held {
		switch {
		case h.claim != c:
			rest = append(rest, h)
		case !show && h.container != c.incumbent,
			show && successor != "" && h.container != c.incumbent && h.container != successor:
			// of a container that kubelet never sees
		default:
			select {
			case b.released <- b.show(h.msg, Locked{b.visibility}):
			default: // see maxEvents
			}
		}
	}
	b.held = rest
}

// Released has the events that were held back and may be sent now.
func (b *Buffer) Released() <-chan []byte { return b.released }

// Close ends the stream.
func (b *Buffer) Close() {
	b.visibility.mu.Lock()
	defer b.visibility.mu.Unlock()
	delete(b.visibility.buffers, b)
}
