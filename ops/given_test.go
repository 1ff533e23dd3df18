// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"fmt"
	"strings"
	"testing"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

func environmentOf(size int) *opsv1.Environment {
	return &opsv1.Environment{
		Variables: []*opsv1.Variable{
			{Name: "A", Source: &opsv1.Variable_Value{Value: []byte(strings.Repeat("x", size))}}}}
}

func TestEnvironmentsAreBounded(t *testing.T) {
	many := func(n, size int) operation.Environments {
		e := operation.Environments{}
		for i := range n {
			e[fmt.Sprint("c", i)] = environmentOf(size)
		}
		return e
	}
	for _, tc := range []struct {
		name  string
		given operation.Environments
		says  string
	}{
		{name: "none"},
		{name: "several that fit each", given: many(6, 2<<20-100)},
		{name: "one that does not", given: many(1, 2<<20), says: "environment of container c0"},
		{name: "too many", given: many(7, 2<<20-100), says: "one command"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := ops.ValidateEnvironments(tc.given)
			if (err != nil) != (tc.says != "") || err != nil && !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v", err)
			}
		})
	}
}
