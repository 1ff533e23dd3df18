// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
)

// removeGate removes the gate's files, if any.
func (s *stager) removeGate() {
	if err := s.c.node.Switchover.Gate(s.c.rec().Token).Remove(); err != nil {
		s.c.log.WithError(err).Warn("gate not removed")
	}
}

// stopWithin stops a container of ours.
func (s *stager) stopWithin(ctx context.Context, id string, grace time.Duration) {
	if err := s.c.node.StopWithin(ctx, id, grace); err != nil {
		s.c.log.WithError(err).Warn("new container not stopped")
	}
}

// removeStaged removes every container that carries the token.
func (s *stager) removeStaged(ctx context.Context) error {
	rec := s.c.rec()
	id, err := s.c.node.FindStaged(ctx, rec.Sandbox, rec.Token)
	if err != nil || id == "" {
		return err
	}
	return s.removeContainer(ctx, id)
}

// removeContainer removes a container that kubelet has not seen, and its traces: kubelet removes
// those of containers that it knows.
func (s *stager) removeContainer(ctx context.Context, id string) error {
	traces := s.traces(ctx, id)
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := s.c.node.Runtime.RemoveContainer(call,
		&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("removing container %s: %w", id, err)
	}
	s.c.node.Records.Removed(id)
	s.c.node.View.Forget(id)
	s.c.node.RemoveTraces(traces)
	return nil
}

// traces are the files that a start of the container has left on the node: the link for log
// shippers and the log. The log of a successor that ran beside its incumbent is kept: it says why
// the restart failed.
func (s *stager) traces(ctx context.Context, id string) []string {
	pod := s.c.op.Pod()
	files := []string{
		filepath.Join(s.c.node.LogLinks,
			criclone.LogLinkName(pod.GetName(), pod.GetNamespace(), s.c.spec.GetName(), id))}
	if s.c.overlaps() {
		return files
	}
	st, err := s.c.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil || st.GetStatus().GetLogPath() == "" {
		return files
	}
	return append(files, st.GetStatus().GetLogPath())
}
