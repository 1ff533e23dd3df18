// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// OverlayResources returns base with every field that over sets. It changes neither.
func OverlayResources(base, over *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	switch {
	case over == nil:
		return base
	case base == nil:
		return proto.Clone(over).(*runtimeapi.LinuxContainerResources)
	}
	out := proto.Clone(base).(*runtimeapi.LinuxContainerResources)
	over = proto.Clone(over).(*runtimeapi.LinuxContainerResources)
	if len(over.GetHugepageLimits()) > 0 {
		out.HugepageLimits = nil // a list is replaced, not appended to
	}
	proto.Merge(out, over)
	return out
}

// ReportedResources returns the resources in the runtime's status of a container: those of its
// creation, and every later change, whoever made it. base are the resources that the container is
// known to have been given by request.
//
// containerd reads them from the OCI spec (internal/cri/server/helpers.go copyResourcesToStatus),
// which UpdateContainerResources changes (internal/cri/opts/spec_linux_opts.go WithResources).
func ReportedResources(
	st *runtimeapi.ContainerStatus, base *runtimeapi.LinuxContainerResources,
) *runtimeapi.LinuxContainerResources {
	if st.GetResources().GetLinux() == nil {
		return nil
	}
	now := proto.Clone(st.GetResources().GetLinux()).(*runtimeapi.LinuxContainerResources)
	// No update changes the score, and containerd may have limited it to its own
	// (restrict_oom_score_adj).
	now.OomScoreAdj = 0
	if base.GetMemorySwapLimitInBytes() == 0 && now.GetMemorySwapLimitInBytes() == now.GetMemoryLimitInBytes() {
		now.MemorySwapLimitInBytes = 0 // containerd's default for a container with a limit
	}
	// Each update appends its limits to the earlier ones. The last limit of a page size counts.
	last := map[string]int{}
	for i, l := range now.GetHugepageLimits() {
		last[l.GetPageSize()] = i
	}
	var limits []*runtimeapi.HugepageLimit
	for i, l := range now.GetHugepageLimits() {
		if last[l.GetPageSize()] == i {
			limits = append(limits, l)
		}
	}
	now.HugepageLimits = limits
	return now
}

// ResourcesDiffer reports whether the two requests ask for different CPU, memory and so on.
// UpdateContainerResources can change those of a container that exists.
func ResourcesDiffer(ours, asked *runtimeapi.CreateContainerRequest) bool {
	of := func(r *runtimeapi.CreateContainerRequest) *runtimeapi.LinuxContainerResources {
		if res := r.GetConfig().GetLinux().GetResources(); res != nil {
			return res
		}
		return &runtimeapi.LinuxContainerResources{}
	}
	return !proto.Equal(of(ours), of(asked))
}
