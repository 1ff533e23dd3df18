// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// takeEnvironments returns the environments of a restart, and takes them out of it.
func takeEnvironments(req *opsv1.RestartRequest) operation.Environments {
	out := operation.Environments{}
	for _, c := range req.GetContainers() {
		add(out, c.GetName(), c.GetEnvironment())
		c.Environment = nil
	}
	return out
}

// takeUpgradeEnvironments is takeEnvironments for an upgrade.
func takeUpgradeEnvironments(req *opsv1.PrepareUpgradeRequest) operation.Environments {
	out := operation.Environments{}
	for _, c := range req.GetContainers() {
		add(out, c.GetName(), c.GetEnvironment())
		c.Environment = nil
	}
	return out
}

// add takes the environment of a container, if it has one.
func add(given operation.Environments, name string, env *opsv1.Environment) {
	if env != nil {
		given[name] = env
	}
}
