// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// passing counts the calls that went through undecoded and are not answered yet: they may still
// carry what becomes hidden meanwhile. The view's lock guards it.
type passing struct {
	calls map[string]int // by method
	// idle, if not nil, is closed when there is none.
	idle chan struct{}
	// unknown are those of them whose methods are not known.
	unknown map[*unknownCall]struct{}
}

// unknownCall is a call that goes through undecoded and may have no end.
type unknownCall struct {
	method string
	cut    func()
}

func (p *passing) endLocked(method string) {
	if p.calls[method]--; p.calls[method] == 0 {
		delete(p.calls, method)
	}
	if len(p.calls) == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
}

// endUnknownLocked takes the call out of the account, once.
func (p *passing) endUnknownLocked(call *unknownCall) {
	if _, there := p.unknown[call]; there {
		delete(p.unknown, call)
		p.endLocked(call.method)
	}
}

// idleLocked returns a channel that is closed once no call passes.
func (p *passing) idleLocked() <-chan struct{} {
	if len(p.calls) == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if p.idle == nil {
		p.idle = make(chan struct{})
	}
	return p.idle
}

// Pass registers a call that goes through undecoded; done must be called when it has been answered.
// ok is false when the view has become active meanwhile.
func (v *Visibility) Pass(method string) (done func(), ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.Active() || v.Guarded() {
		return nil, false
	}
	switch method {
	case runtimeapi.RuntimeService_ListContainers_FullMethodName,
		runtimeapi.RuntimeService_StreamContainers_FullMethodName:
		v.history.inRelist.Store(false) // whatever its filter is
	}
	v.passing.calls[method]++
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.passing.endLocked(method)
	}, true
}

// passingNames returns the methods of calls that pass undecoded, ordered, without their services.
func (v *Visibility) passingNames() string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var names []string
	for method := range v.passing.calls {
		names = append(names, method[strings.LastIndexByte(method, '/')+1:])
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// unknownTimeout bounds how long a call of a method that is newer than this version waits until
// nothing is hidden. Kubelet gives its calls two minutes (runtimeRequestTimeout): the runtime must
// have some of them left.
const unknownTimeout = 90 * time.Second

// PassUnknown waits until nothing is hidden, at most for 90 s or until ctx ends, and registers a
// call of an unknown method. quiet reports whether nothing is hidden. done must be called when the
// call has been answered.
//
// under says that the answer still tells of containers while the call is under way. Such a call is
// registered like those of [Visibility.Pass], in the moment in which nothing is hidden, and cut
// ends it. ok is false when this view is given to another process: nobody will ever say here that
// nothing is hidden.
func (v *Visibility) PassUnknown(
	ctx context.Context, method string, under bool, cut func(),
) (done func(), quiet, ok bool) {
	call := &unknownCall{method: method, cut: cut}
	done = func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.passing.endUnknownLocked(call)
	}
	timer := time.NewTimer(unknownTimeout)
	defer timer.Stop()
	for waits := true; ; {
		nothingHidden := v.tryUnknown(call, under, waits)
		if nothingHidden == nil {
			return done, waits, true
		}
		select {
		case <-nothingHidden:
		case <-v.history.exported:
			return nil, false, false
		case <-timer.C:
			waits = false
		case <-ctx.Done():
			waits = false
		}
	}
}

// tryUnknown registers the call unless it waits and something is hidden: then it returns what is
// closed when nothing is hidden any more.
func (v *Visibility) tryUnknown(call *unknownCall, under, waits bool) <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if waits && len(v.tokens) > 0 {
		if v.nothingHidden == nil {
			v.nothingHidden = make(chan struct{})
		}
		return v.nothingHidden
	}
	if under {
		v.passing.calls[call.method]++
		v.passing.unknown[call] = struct{}{}
	}
	return nil
}

// cutUnknown ends the calls of methods that are not known. From its return on they show nothing any
// more, whether or not their callers read what was before.
func (v *Visibility) cutUnknown() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for call := range v.passing.unknown {
		call.cut()
		v.passing.endUnknownLocked(call)
	}
}
