// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

const (
	// maxEnvironment bounds the environment of one container, in bytes: Linux bounds the
	// environment and the command line of a process together to a quarter of its stack limit, which
	// is 2 MiB by default (execve(2)). Controllers do not send more (controller/environment).
	maxEnvironment = 2 << 20
	// maxEnvironments bounds the environments of one command together. The bounds of messages leave
	// room for them and for the rest of a command (internal/mtls, internal/daemon).
	maxEnvironments = 12 << 20
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

func validateEnvironments(given operation.Environments) error {
	sum := 0
	for name, env := range given {
		n := proto.Size(env)
		if n > maxEnvironment {
			return status.Errorf(codes.InvalidArgument,
				"the environment of container %s has %d bytes, more than a process can be started with (%d)",
				name, n, maxEnvironment)
		}
		sum += n
	}
	if sum > maxEnvironments {
		return status.Errorf(codes.InvalidArgument,
			"the environments have %d bytes, more than one command may bring (%d)", sum, maxEnvironments)
	}
	return nil
}

// forgetEndedEnvironments drops, at the start, the environments that the process before this one
// could not forget: those of operations that have ended, or that the journal does not have.
func (e *Engine) forgetEndedEnvironments() {
	kept := map[string]bool{}
	for uid, o := range e.ops {
		kept[uid] = o.IsLeftAlone() || !o.Finished()
	}
	e.records.KeepEnvironments(func(operation string) bool { return kept[operation] })
}
