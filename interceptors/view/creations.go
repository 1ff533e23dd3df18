// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Creation is a CreateContainer of kubelet's in the slot. It waits for one answer.
type Creation struct {
	Request *runtimeapi.CreateContainerRequest
	answer  chan answer // has room for one
}

// answer is as [Driver] returns it.
type answer struct {
	id string
	ok bool
}

// Adopt answers with a container that is there.
func (c *Creation) Adopt(id string) { c.answer <- answer{id: id, ok: true} }

// Yield answers that the operation yields.
func (c *Creation) Yield() { c.answer <- answer{} }

// Creations takes kubelet's calls to the goroutine that carries out the operation. That goroutine
// receives from it.
type Creations chan *Creation

// Ask is [Driver]'s Create: it returns what the call is answered with. A call that nobody
// answers waits for the end of the operation. over is closed when the operation answers no more.
func (c Creations) Ask(
	ctx context.Context, req *runtimeapi.CreateContainerRequest, over <-chan struct{},
) (id string, ok bool) {
	q := &Creation{Request: req, answer: make(chan answer, 1)}
	select {
	case c <- q:
	case <-over:
		return "", true
	case <-ctx.Done():
		return "", true
	}
	select {
	case a := <-q.answer:
		return a.id, a.ok
	case <-over:
	case <-ctx.Done():
		return "", true
	}
	select {
	case a := <-q.answer: // its last
		return a.id, a.ok
	default:
		return "", true
	}
}
