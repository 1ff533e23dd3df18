// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes_test

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// answers gives each GetOperation the answer of a function.
type answers struct {
	nodes.Operations
	get func() error
}

func (a *answers) GetOperation(context.Context, nodes.Node, string) (*opsv1.Operation, error) {
	return nil, a.get()
}

// While a node is silent only one call at a time finds out about it; an answer ends that.
func TestDoubt(t *testing.T) {
	inner := &answers{}
	p := nodes.NewPatient(inner)
	n := nodes.Node{Name: "n"}
	silent := &nodes.Error{Node: n, Err: status.Error(codes.Unavailable, "away"), Silent: true}
	call := func(get func() error) error {
		inner.get = get
		_, err := p.GetOperation(t.Context(), n, "x")
		return err
	}
	says := func(err error) func() error { return func() error { return err } }
	if err := call(says(silent)); !errors.Is(err, silent) {
		t.Fatal(err)
	}
	made := false
	if err := call(func() error {
		made = true
		if err := call(says(nil)); !errors.Is(err, silent) {
			t.Errorf("a second call was made: %v", err)
		}
		return nil
	}); err != nil || !made {
		t.Errorf("the first one was not made: %v", err)
	}
	if p.Suspects() != 0 {
		t.Error("still in doubt after an answer")
	}
	refusal := &nodes.Error{Node: n, Err: status.Error(codes.NotFound, "none")}
	if err := call(says(refusal)); !errors.Is(err, refusal) || p.Suspects() != 0 {
		t.Errorf("%v; a node that answers is not in doubt", err)
	}
}
