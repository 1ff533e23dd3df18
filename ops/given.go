// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// maxEnvironment bounds the environment of one container, in bytes: Linux bounds that of a process, with its
	// command line, to a quarter of its stack limit, which is 2 MiB where nobody has changed it (execve(2)).
	// Controllers do not send more (controller/environment).
	maxEnvironment = 2 << 20
	// maxEnvironments bounds those of one command together. The bounds of messages leave room for it and for the rest of a
	// command (internal/mtls, internal/daemon).
	maxEnvironments = 12 << 20
)

// environments are those of an operation's containers, as the command has brought them. They are as secret
// as the records of requests, and kept there; the journal knows only that there are some.
type environments map[string]*opsv1.Environment

// takeEnvironments returns the environments of a restart, and takes them out of it.
func takeEnvironments(req *opsv1.RestartRequest) environments {
	out := environments{}
	for _, c := range req.GetContainers() {
		out.add(c.GetName(), c.GetEnvironment())
		c.Environment = nil
	}
	return out
}

// takeUpgradeEnvironments is takeEnvironments for an upgrade.
func takeUpgradeEnvironments(req *opsv1.PrepareUpgradeRequest) environments {
	out := environments{}
	for _, c := range req.GetContainers() {
		out.add(c.GetName(), c.GetEnvironment())
		c.Environment = nil
	}
	return out
}

func (e environments) add(name string, env *opsv1.Environment) {
	if env != nil {
		e[name] = env
	}
}

func (e environments) validate() error {
	sum := 0
	for name, env := range e {
		n := proto.Size(env)
		if n > maxEnvironment {
			return status.Errorf(codes.InvalidArgument, "the environment of container %s has %d bytes, more than a process can be started with (%d)", name, n, maxEnvironment)
		}
		sum += n
	}
	if sum > maxEnvironments {
		return status.Errorf(codes.InvalidArgument, "the environments have %d bytes, more than one command may bring (%d)", sum, maxEnvironments)
	}
	return nil
}

// environment returns the container's environment, of this command or as the process before this one has
// recorded it. lost: the command had one and it is not there any more.
func (e *Engine) environment(o *operation, name string) (env *opsv1.Environment, lost bool) {
	o.mu.Lock()
	env, had := o.environments[name], slices.Contains(o.had, name)
	o.mu.Unlock()
	if env == nil && had {
		env = e.records.environment(o.req.GetUid(), name)
	}
	return env, env == nil && had
}

// again returns the operation that a repeated command is about. What the command brings anew, credentials
// and environments, counts for what is still to be done.
func (e *Engine) again(known, repeated *operation) (*operation, error) {
	if _, err := known.as(repeated); err != nil {
		return nil, err
	}
	known.mu.Lock()
	defer known.mu.Unlock()
	if known.op.GetFinishTime() == nil && !known.isReleased {
		e.giveLocked(known, repeated.environments)
	}
	return known, nil
}

// giveLocked records the environments of a command, in place of those before. The caller holds o.mu.
func (e *Engine) giveLocked(o *operation, given environments) {
	for name, env := range given {
		if o.environments == nil {
			o.environments = environments{}
		}
		o.environments[name] = env
		if !slices.Contains(o.had, name) {
			o.had = append(o.had, name)
		}
		e.records.setEnvironment(o.req.GetUid(), name, env)
	}
}

// forgetEndedEnvironments drops, at the start, what the process before this one could not forget: environments of
// operations that have ended, or that the journal does not have.
func (e *Engine) forgetEndedEnvironments() {
	kept := map[string]bool{}
	for uid, o := range e.ops {
		kept[uid] = o.left || !o.finished()
	}
	e.records.keepEnvironments(func(operation string) bool { return kept[operation] })
}

// forgetEnvironmentsLocked is for an operation that has ended. The caller holds o.mu.
func (e *Engine) forgetEnvironmentsLocked(o *operation) {
	for _, name := range o.had {
		e.records.forgetEnvironment(o.req.GetUid(), name)
	}
	o.environments = nil
}
