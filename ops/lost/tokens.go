// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost

import (
	"sync"

	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// Tokens are those of staged containers that this process has used or found in the journal, until
// no container can be a stray any more.
type Tokens struct {
	mu    sync.Mutex
	known map[string]bool // nil: nothing can be a stray any more
}

// NewTokens returns an empty set.
func NewTokens() *Tokens { return &Tokens{known: map[string]bool{}} }

// New returns a random token that the set has.
func (t *Tokens) New() string {
	token := operation.RandomToken()
	t.Add(token)
	return token
}

// Add puts a token into the set. Neither its container nor its gate is then taken for a stray.
func (t *Tokens) Add(token string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known != nil {
		t.known[token] = true
	}
}

// Has reports whether the set has the token.
func (t *Tokens) Has(token string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.known[token]
}

// Close ends the search for strays: the set is empty from then on.
func (t *Tokens) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known = nil
}

// closed reports whether Close was called.
func (t *Tokens) closed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.known == nil
}
