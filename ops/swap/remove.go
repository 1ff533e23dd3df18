// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

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
func (s *Stager) removeGate() {
	if err := s.c.Node.Switchover.Gate(s.c.Record().Token).Remove(); err != nil {
		s.c.Log.WithError(err).Warn("gate not removed")
	}
}

// StopWithin stops a container of ours.
func (s *Stager) StopWithin(ctx context.Context, id string, grace time.Duration) {
	if err := s.c.Node.StopWithin(ctx, id, grace); err != nil {
		s.c.Log.WithError(err).Warn("new container not stopped")
	}
}

// removeStaged removes every container that carries the token.
func (s *Stager) removeStaged(ctx context.Context) error {
	rec := s.c.Record()
	id, err := s.c.Node.FindStaged(ctx, rec.Sandbox, rec.Token)
	if err != nil || id == "" {
		return err
	}
	return s.Remove(ctx, id)
}

// Remove removes a container that kubelet has not seen, and its traces: kubelet removes
// those of containers that it knows.
func (s *Stager) Remove(ctx context.Context, id string) error {
	traces := s.traces(ctx, id)
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := s.c.Node.Runtime.RemoveContainer(call,
		&runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("removing container %s: %w", id, err)
	}
	s.c.Node.Records.Removed(id)
	s.c.Node.View.Forget(id)
	s.c.Node.RemoveTraces(traces)
	return nil
}

// traces are the files that a start of the container has left on the node: the link for log
// shippers and the log. The log of a successor that ran beside its incumbent is kept: it says why
// the restart failed.
func (s *Stager) traces(ctx context.Context, id string) []string {
	pod := s.c.Op.Pod()
	files := []string{
		filepath.Join(s.c.Node.LogLinks,
			criclone.LogLinkName(pod.GetName(), pod.GetNamespace(), s.c.Spec.GetName(), id))}
	if s.c.Overlaps() {
		return files
	}
	st, err := s.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil || st.GetStatus().GetLogPath() == "" {
		return files
	}
	return append(files, st.GetStatus().GetLogPath())
}
