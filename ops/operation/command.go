// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"slices"

	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Environments are the environments of containers, by name. They are secret: the records of this
// boot keep them, the journal knows only for which containers there are some.
type Environments map[string]*opsv1.Environment

// Command is what a caller asks for: a restart, or an upgrade.
type Command struct {
	// Restart has no credentials and no environments. Of an upgrade it is what the upgrade has in
	// common with a restart.
	Restart *opsv1.RestartRequest
	// Upgrade is nil for a restart. It has no credentials and no environments.
	Upgrade      *opsv1.PrepareUpgradeRequest
	Credentials  []*opsv1.RegistryCredential
	Environments Environments
}

// RestartCommand returns the command of a request whose environments have been taken out. It takes
// the request, and the credentials out of it.
func RestartCommand(req *opsv1.RestartRequest, given Environments) Command {
	c := Command{Restart: req, Credentials: req.GetCredentials(), Environments: given}
	req.Credentials = nil
	return c
}

// UpgradeCommand returns the command of a request whose environments have been taken out.
func UpgradeCommand(req *opsv1.PrepareUpgradeRequest, given Environments) Command {
	return Command{
		Restart: restartOf(req), Upgrade: withoutCredentials(req), Credentials: req.GetCredentials(),
		Environments: given,
	}
}

// restartOf is what an upgrade has in common with a restart.
func restartOf(req *opsv1.PrepareUpgradeRequest) *opsv1.RestartRequest {
	r := &opsv1.RestartRequest{Uid: req.GetUid(), Pod: req.GetPod(), Requester: req.GetRequester()}
	for _, c := range req.GetContainers() {
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{
			Name: c.GetName(), ExpectedContainerId: c.GetExpectedContainerId(), Order: c.GetOrder(),
			MinReadySeconds: c.GetMinReadySeconds(), HoldProbes: c.GetHoldProbes(),
		})
	}
	return proto.Clone(r).(*opsv1.RestartRequest)
}

func withoutCredentials(req *opsv1.PrepareUpgradeRequest) *opsv1.PrepareUpgradeRequest {
	out := proto.Clone(req).(*opsv1.PrepareUpgradeRequest)
	out.Credentials = nil
	return out
}

// Same reports whether two commands ask for the same. Credentials, environments and the requester
// do not count.
func (c Command) Same(other Command) bool {
	return sameRestart(c.Restart, other.Restart) && sameUpgrade(c.Upgrade, other.Upgrade)
}

// sameRestart compares requests. A pod UID does not count if one of the two left it to the node.
func sameRestart(a, b *opsv1.RestartRequest) bool {
	a, b = proto.Clone(a).(*opsv1.RestartRequest), proto.Clone(b).(*opsv1.RestartRequest)
	a.Requester, b.Requester = "", ""
	a.Credentials, b.Credentials = nil, nil
	if a.GetPod().GetUid() == "" || b.GetPod().GetUid() == "" {
		a.Pod.Uid, b.Pod.Uid = "", ""
	}
	return proto.Equal(a, b)
}

// sameUpgrade compares what sameRestart does not.
func sameUpgrade(a, b *opsv1.PrepareUpgradeRequest) bool {
	if a == nil || b == nil {
		return a == b
	}
	a, b = withoutCredentials(a), withoutCredentials(b)
	a.Requester, b.Requester = "", ""
	a.Pod, b.Pod = nil, nil
	return proto.Equal(a, b)
}

// SameSubject reports whether two operations are upgrades of one owner that have a container in
// common.
func SameSubject(a, b *Operation) bool {
	owner := a.upgrade.GetOwner()
	if owner == "" || owner != b.upgrade.GetOwner() || a.Pod().GetUid() != b.Pod().GetUid() {
		return false
	}
	return slices.ContainsFunc(a.restart.GetContainers(), func(x *opsv1.ContainerRestart) bool {
		return slices.ContainsFunc(b.restart.GetContainers(), func(y *opsv1.ContainerRestart) bool {
			return x.GetName() == y.GetName()
		})
	})
}
