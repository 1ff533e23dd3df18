// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"sync"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/crew"
)

// unhurried is a NodeClient whose waiting costs nobody else anything: a call takes no turn of the reconciles that work, and while a node
// gives no answer only one call at a time finds out whether it does again. The others are told at once what the last one was.
type unhurried struct {
	NodeClient

	mu    sync.Mutex
	nodes map[Node]*doubt // those that did not answer
}

// maxDoubts bounds what is kept of nodes that are gone. Who is forgotten is asked once more.
const maxDoubts = 10000

// doubt is about a node that did not answer the last call.
type doubt struct {
	err    error
	trying bool
}

func newUnhurried(c NodeClient) *unhurried {
	return &unhurried{NodeClient: c, nodes: map[Node]*doubt{}}
}

// begin says whether a node may be called, and if not, why.
func (u *unhurried) begin(n Node) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	d := u.nodes[n]
	switch {
	case d == nil:
		return nil
	case d.trying:
		return d.err
	}
	d.trying = true
	return nil
}

// end notes whether it answered. What the caller has ended says nothing about the node.
func (u *unhurried) end(ctx context.Context, n Node, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var nodeError *NodeError
	switch silent := errors.As(err, &nodeError) && nodeError.Silent; {
	case silent && ctx.Err() == nil:
		if len(u.nodes) >= maxDoubts {
			clear(u.nodes)
		}
		u.nodes[n] = &doubt{err: err}
	case !silent:
		delete(u.nodes, n)
	case u.nodes[n] != nil:
		u.nodes[n].trying = false
	}
}

func unhurriedly[T any](ctx context.Context, u *unhurried, n Node, call func() (T, error)) (answer T, err error) {
	if err := u.begin(n); err != nil {
		return answer, err
	}
	crew.Away(ctx, func() { answer, err = call() })
	u.end(ctx, n, err)
	return answer, err
}

// Restart implements NodeClient.
func (u *unhurried) Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	return unhurriedly(ctx, u, n, func() (*opsv1.Operation, error) { return u.NodeClient.Restart(ctx, n, r) })
}

// GetOperation implements NodeClient.
func (u *unhurried) GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error) {
	return unhurriedly(ctx, u, n, func() (*opsv1.Operation, error) { return u.NodeClient.GetOperation(ctx, n, uid) })
}

// ListOperations implements NodeClient.
func (u *unhurried) ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error) {
	return unhurriedly(ctx, u, n, func() ([]*opsv1.Operation, error) { return u.NodeClient.ListOperations(ctx, n) })
}

// CancelOperation implements NodeClient.
func (u *unhurried) CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return unhurriedly(ctx, u, n, func() (*opsv1.Operation, error) { return u.NodeClient.CancelOperation(ctx, n, uid, reason) })
}
