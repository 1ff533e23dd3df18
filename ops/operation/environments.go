// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"slices"

	"github.com/cri-proxy/cri-proxy/ops/store"
)

// environments are those of an operation's containers. The operation's lock guards them.
type environments struct {
	given Environments // to this process
	had   []string     // containers that have been given one, also in the process before this one
}

// give records environments, in place of those before.
func (e *environments) give(given Environments, uid string, records *store.Records) {
	for name, env := range given {
		if e.given == nil {
			e.given = Environments{}
		}
		e.given[name] = env
		if !slices.Contains(e.had, name) {
			e.had = append(e.had, name)
		}
		records.SetEnvironment(uid, name, env)
	}
}

// forget is called for an operation that has ended.
func (e *environments) forget(uid string, records *store.Records) {
	for _, name := range e.had {
		records.ForgetEnvironment(uid, name)
	}
	e.given = nil
}
