// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"slices"
	"sync"

	"github.com/sirupsen/logrus"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// All that the tests, which are in package ops_test, reach for inside.

const (
	KeepFinished  = keepFinished
	ForgetEvery   = forgetEvery
	MaxActive     = maxActive
	MaxFinished   = maxFinished
	ListDefault   = listDefault
	MaxContainers = maxContainers
	MaxHookBytes  = maxHookBytes
	MaxImage      = maxImage
)

var (
	ValidateRestart      = validateRestart
	ValidateEnvironments = validateEnvironments
)

// Lookup returns an operation itself, not what clients are told of it.
func (e *Engine) Lookup(uid string) *operation.Operation { return e.operations.lookup(uid) }

// List is ListOperations without its limit.
func (e *Engine) List() []*opsv1.Operation { return e.operations.list() }

// Waiting returns the operations that have not been started, in order.
func (e *Engine) Waiting() []*operation.Operation {
	e.operations.mu.Lock()
	defer e.operations.mu.Unlock()
	return slices.Clone(e.operations.waiting)
}

// Add puts an operation beside those that the engine has.
func (e *Engine) Add(o *operation.Operation) {
	e.operations.mu.Lock()
	defer e.operations.mu.Unlock()
	e.operations.all[o.UID()] = o
}

// Submit accepts an operation without a check.
func (e *Engine) Submit(c operation.Command, pod *opsv1.PodRef) (*operation.Operation, error) {
	return e.operations.accept(c, pod)
}

// Precheck is the check that comes before Submit.
func (s *Server) Precheck(ctx context.Context, req *opsv1.RestartRequest) (*opsv1.PodRef, error) {
	return s.precheck(ctx, req)
}

// Expire forgets operations that are too old or too many.
func (e *Engine) Expire() error { return e.operations.expire() }

// Tidy forgets what is recorded of containers that are gone.
func (e *Engine) Tidy(ctx context.Context) { e.tidier.tidy(ctx, &sync.WaitGroup{}) }

// StopAccepting is the beginning of Close.
func (e *Engine) StopAccepting() {
	e.operations.mu.Lock()
	defer e.operations.mu.Unlock()
	e.operations.closed = true
}

// Revive takes one operation from a journal, and makes what carries out each of its containers. It
// returns the operation, or nil if the record cannot be used.
func Revive(node *swap.Node, log logrus.FieldLogger, uid string, record *store.Record) *operation.Operation {
	disk := &store.Store{}
	e := &Engine{node: node, disk: disk, log: log, operations: newOperations(disk, log)}
	r := recovery{node: node, disk: disk, log: log, operations: e.operations}
	if r.revive(uid, record) != nil {
		return nil
	}
	o := e.operations.lookup(uid)
	for i := range o.Records() {
		e.container(o, i)
	}
	return o
}
