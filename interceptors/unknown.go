// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"strings"

	"github.com/cri-proxy/cri-proxy/proxy"
)

var _ proxy.UnknownPasser = (*Director)(nil)

// PassUnknown implements [proxy.UnknownPasser]. The answer of a method that is not known cannot be
// changed. If its name says that it tells of containers the call waits until nothing is hidden, and
// then it is counted as one that goes through undecoded. One that has waited for 90 s goes on all
// the same: kubelet must not be left without an answer for as long as an upgrade is held ready.
func (d *Director) PassUnknown(ctx context.Context, method string, cut func()) (done func(), ok bool) {
	tells, under := d.unknownTells(method)
	if !tells {
		return nil, true
	}
	// What an earlier process has left is hidden by then. Where the runtime does not tell of it,
	// the runtime does not answer this call either.
	if err := d.awaitJudge(ctx); err != nil {
		d.log.WithError(err).WithField("method", method).
			Debug("answered before the containers of an earlier process are known")
	}
	done, quiet, ok := d.view.PassUnknown(ctx, method, under, cut)
	if !ok {
		return nil, false
	}
	if !quiet && ctx.Err() == nil {
		d.log.WithField("method", method).Warn(
			"a method that this version does not know is answered while a container is hidden, and may show it; " +
				"upgrade cri-proxy")
	}
	return done, true
}

// unknownTells reports whether a method that this version does not know tells of containers, by the
// names that the CRI has given such methods so far, and whether it still does so while it is under
// way: a checkpoint is made of what there is when it begins.
func (d *Director) unknownTells(method string) (tells, under bool) {
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
		known := d.methods[runtimeService+name]
		tells = known != nil && known.tells
		return tells, tells
	}
}
