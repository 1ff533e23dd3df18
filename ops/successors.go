// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
)

// Fits implements [interceptors.Successors].
func (e *Engine) Fits(ctx context.Context, id string, req *runtimeapi.CreateContainerRequest) bool {
	ours := e.node.Records.Request(id)
	if ours == nil {
		return false
	}
	labels := req.GetConfig().GetLabels()
	asked := e.node.Overridden(ctx,
		view.Slot{PodUID: labels[criclone.LabelPodUID], Container: labels[criclone.LabelContainer]}, req)
	if len(criclone.Diff(criclone.AlignMounts(ours, asked), asked)) > 0 {
		return false
	}
	if err := e.node.MatchResources(ctx, id, asked); err != nil {
		e.log.WithField("container", id).WithError(err).
			Warn("the container did not take the resources that kubelet asked for")
	}
	return true
}

// Kept implements [interceptors.Pods].
func (e *Engine) Kept(ctx context.Context, podUID string) bool {
	if e.node.Pods == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, podsapi.Timeout)
	defer cancel()
	pod, err := e.node.Pods.Pod(ctx, podUID)
	return err == nil && pod.Leaving() == ""
}

// Unleavable returns the operations that Run would not leave at once, ordered: they wait for a
// container to stop, which nothing cuts short, or are about to start its successor. Run can leave
// all others at any time.
func (e *Engine) Unleavable() []string { return e.operations.unleavable() }
