// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"slices"
	"strings"

	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Unleavable returns the operations that Run would not leave at once, ordered: they wait for a
// container to stop, which nothing cuts short, or are about to start its successor. Run can leave
// all others at any time.
func (e *Engine) Unleavable() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var uids []string
	for uid, o := range e.ops {
		// An operation that finishes meanwhile has no such container any more.
		if !o.Finished() && slices.ContainsFunc(o.Records(), unleavable) {
			uids = append(uids, uid)
		}
	}
	slices.SortFunc(uids, strings.Compare)
	return uids
}

func unleavable(c store.Container) bool { return c.Unleavable() }
