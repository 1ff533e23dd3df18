// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"slices"
	"strings"
)

// Unleavable returns the operations that Run would not leave at once, ordered: they wait for a container to stop, which nothing
// cuts short, or are about to start the one in its place. Others can be left at any time.
func (e *Engine) Unleavable() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var uids []string
	for uid, o := range e.ops {
		if o.Unleavable() {
			uids = append(uids, uid)
		}
	}
	slices.SortFunc(uids, strings.Compare)
	return uids
}
