// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"
	"errors"
	"sync"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// maxSuspects bounds how many silent nodes [Patient] remembers. A node that it forgets is called
// once more.
const maxSuspects = 10000

// Patient is [Operations] whose waiting costs nobody else anything. A call that waits for its node
// takes no slot of the reconciles that work. While a node is silent, only one call at a time finds
// out whether the node answers again; the other calls get the last error at once. WatchOperation
// goes straight to the node.
type Patient struct {
	Operations

	mu       sync.Mutex
	suspects map[Node]*suspect // nodes that did not answer the last call
}

// suspect is a node that did not answer the last call.
type suspect struct {
	err error
	// probing says that a call is under way.
	probing bool
}

// NewPatient returns a Patient in front of inner.
func NewPatient(inner Operations) *Patient {
	return &Patient{Operations: inner, suspects: map[Node]*suspect{}}
}

// begin says whether a node may be called. The error says why not.
func (p *Patient) begin(n Node) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.suspects[n]
	switch {
	case s == nil:
		return nil
	case s.probing:
		return s.err
	}
	s.probing = true
	return nil
}

// end notes whether the node answered. A call that the caller cancelled says nothing about the
// node.
func (p *Patient) end(ctx context.Context, n Node, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var e *Error
	switch silent := errors.As(err, &e) && e.Silent; {
	case silent && ctx.Err() == nil:
		if len(p.suspects) >= maxSuspects {
			clear(p.suspects)
		}
		p.suspects[n] = &suspect{err: err}
	case !silent:
		delete(p.suspects, n)
	case p.suspects[n] != nil:
		p.suspects[n].probing = false
	}
}

func patiently[T any](ctx context.Context, p *Patient, n Node, call func() (T, error)) (answer T, err error) {
	if err := p.begin(n); err != nil {
		return answer, err
	}
	workerpool.Away(ctx, func() { answer, err = call() })
	p.end(ctx, n, err)
	return answer, err
}

// Restart implements Operations.
func (p *Patient) Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	return patiently(ctx, p, n, func() (*opsv1.Operation, error) { return p.Operations.Restart(ctx, n, r) })
}

// GetOperation implements Operations.
func (p *Patient) GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error) {
	return patiently(ctx, p, n, func() (*opsv1.Operation, error) { return p.Operations.GetOperation(ctx, n, uid) })
}

// ListOperations implements Operations.
func (p *Patient) ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error) {
	return patiently(ctx, p, n, func() ([]*opsv1.Operation, error) { return p.Operations.ListOperations(ctx, n) })
}

// CancelOperation implements Operations.
func (p *Patient) CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return patiently(ctx, p, n, func() (*opsv1.Operation, error) {
		return p.Operations.CancelOperation(ctx, n, uid, reason)
	})
}
