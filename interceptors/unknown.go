// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"strings"
	"time"

	"github.com/cri-proxy/cri-proxy/proxy"
)

const (
	// unknownPatience bounds how long a call of a method that is newer than this version waits
	// until nothing is hidden. Kubelet gives its calls two minutes (runtimeRequestTimeout): the
	// runtime must have some of them left.
	unknownPatience = 90 * time.Second
	// cutPatience is how long an operation waits for such a call that is under way before it ends
	// it. A list takes milliseconds; what takes this long is a stream without an end, which its
	// caller opens again.
	cutPatience = 2 * time.Second
)

var _ proxy.UnknownPasser = (*Director)(nil)

// PassUnknown implements [proxy.UnknownPasser]. The answer of a method that is not known cannot be
// changed. If its name says that it tells of containers the call waits until nothing is hidden, and
// then it is counted as one that goes through undecoded. One that has waited for 90 s goes on all
// the same: kubelet must not be left without an answer for as long as an upgrade is held ready.
func (d *Director) PassUnknown(ctx context.Context, method string, cut func()) (done func(), ok bool) {
	tells, under := unknownTells(method)
	if !tells {
		return nil, true
	}
	// What an earlier process has left is hidden by then. Where the runtime does not tell of it, it does not answer this call either.
	if err := d.judged(ctx); err != nil {
		d.log.WithError(err).WithField("method", method).Debug("answered before the containers of an earlier process are known")
	}
	call := &cuttable{method: method, cut: cut}
	quiet, ok := d.view.passUnknown(ctx, call, under)
	if !ok {
		return nil, false
	}
	if !quiet && ctx.Err() == nil {
		d.log.WithField("method", method).Warn(
			"a method that this version does not know is answered while a container is hidden, and may show it; " +
				"upgrade cri-proxy")
	}
	return func() { d.view.over(call) }, true
}

// unknownTells reports whether a method that this version does not know tells of containers, by the
// names that the CRI has given such methods so far, and whether it still does so while it is under
// way: a checkpoint is made of what there is when it begins.
func unknownTells(method string) (tells, under bool) {
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !strings.HasPrefix(service, "runtime.") || !strings.HasSuffix(service, ".RuntimeService") {
		return false, false
	}
	switch {
	case strings.HasPrefix(name, "Checkpoint"):
		return true, false
	case strings.HasPrefix(name, "List"), strings.HasPrefix(name, "Stream"),
		strings.HasPrefix(name, "Get") && strings.HasSuffix(name, "Events"),
		strings.HasSuffix(name, "Stats"), strings.HasSuffix(name, "Metrics"), strings.HasSuffix(name, "Statuses"):
		return true, true
	default: // of another version of the CRI
		known := "/runtime.v1.RuntimeService/" + name
		return tellsOf[known], tellsOf[known]
	}
}

// passUnknown waits until nothing is hidden, at most for [unknownPatience] or until ctx ends, and
// reports whether that came. If the call still tells while it is under way it is registered like
// those of [View.pass], in the same moment. ok is false when this view is given to another process:
// nobody will ever say here that nothing is hidden.
func (v *View) passUnknown(ctx context.Context, call *cuttable, under bool) (quiet, ok bool) {
	timer := time.NewTimer(unknownPatience)
	defer timer.Stop()
	for waits := true; ; {
		came := v.tryUnknown(call, under, waits)
		if came == nil {
			return waits, true
		}
		select {
		case <-came:
		case <-v.carried:
			return false, false
		case <-timer.C:
			waits = false
		case <-ctx.Done():
			waits = false
		}
	}
}

// tryUnknown registers the call unless it waits and something is hidden: then it returns what is
// closed when nothing is any more.
func (v *View) tryUnknown(call *cuttable, under, waits bool) <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if waits && len(v.tokens) > 0 {
		if v.nothing == nil {
			v.nothing = make(chan struct{})
		}
		return v.nothing
	}
	if under {
		v.passing[call.method]++
		v.cuttable[call] = struct{}{}
	}
	return nil
}

// over says that the call has been answered.
func (v *View) over(call *cuttable) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropLocked(call)
}

// cuttable is a call that goes through undecoded and may have no end.
type cuttable struct {
	method string
	cut    func()
}

// dropLocked takes the call out of the account, once.
func (v *View) dropLocked(c *cuttable) {
	if _, there := v.cuttable[c]; there {
		delete(v.cuttable, c)
		v.passedLocked(c.method)
	}
}

// cutUnknown ends the calls of methods that are not known. They show nothing any more from its
// return on, whether or not their callers read what was before.
func (v *View) cutUnknown() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for c := range v.cuttable {
		c.cut()
		v.dropLocked(c)
	}
}
