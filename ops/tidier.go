// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// tidier forgets what is recorded of containers, pods and overrides that are gone.
type tidier struct {
	node *swap.Node
	log  logrus.FieldLogger
}

// tidy forgets containers that went away while the proxy did not look, and takes care of those
// whose operation is lost; wg owns that. It tries until the runtime lists its containers, and
// returns false if ctx ends before.
func (t *tidier) tidy(ctx context.Context, wg *sync.WaitGroup) bool {
	defer t.node.Lost.Clear(ctx, wg) // even after a panic: their slots are held
	t.forgetOverrides(ctx)
	if t.node.Lost.AwaitJudged(ctx) != nil {
		return false
	}
	list, err := t.forgetRemoved(ctx)
	for wait := 200 * time.Millisecond; err != nil; wait = min(2*wait, 5*time.Second) {
		t.log.WithError(err).Warn("records not tidied; trying again")
		t.node.Lost.Clear(ctx, wg) // does not wait for that
		if crinode.Sleep(ctx, wait) != nil {
			return false
		}
		list, err = t.forgetRemoved(ctx)
	}
	t.node.Lost.JudgeNew(ctx, list) // what has come about since
	if err := t.node.Switchover.RemoveStray(t.node.Tokens.Has); err != nil {
		t.log.WithError(err).Warn("gates that no operation knows not removed")
	}
	return true
}

// forgetRemoved forgets containers that do not exist any more, and returns those that do.
func (t *tidier) forgetRemoved(ctx context.Context) ([]*runtimeapi.Container, error) {
	// What is recorded is read first: a container made between the two reads is in the list but not
	// in the records read, and stays.
	recorded := map[string]bool{}
	for _, id := range t.node.Records.IDs() {
		recorded[id] = true
	}
	list, err := t.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, c := range list.GetContainers() {
		delete(recorded, c.GetId())
	}
	for id := range recorded {
		t.node.Records.Removed(id)
		t.node.View.Forget(id)
	}
	return list.GetContainers(), nil
}

// writeEnded writes the end of overrides that a call of kubelet's has ended, until ctx ends. What
// is left then goes with the next write, or with the end of the engine.
func (t *tidier) writeEnded(ctx context.Context) {
	for {
		select {
		case <-t.node.Overrides.Dirty():
			t.node.Overrides.Flush()
		case <-ctx.Done():
			return
		}
	}
}

// forgetOnRemoval ends overrides of pods that are gone, whenever a sandbox is removed, until ctx
// ends. A pod may have several sandboxes; kubelet removes the older ones.
func (t *tidier) forgetOnRemoval(ctx context.Context) {
	for {
		select {
		case <-t.node.Overrides.Removed():
		case <-ctx.Done():
			return
		}
		t.forgetOverrides(ctx)
	}
}

// forgetOverrides ends overrides of pods that have no sandbox any more.
func (t *tidier) forgetOverrides(ctx context.Context) {
	// The overrides are read first: a pod that gets one after that had a sandbox at least until
	// then.
	all := t.node.Overrides.List()
	if len(all) == 0 {
		return
	}
	list, err := t.node.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		if ctx.Err() == nil {
			t.log.WithError(err).Warn("image overrides not tidied")
		}
		return
	}
	there := map[string]bool{}
	for _, sandbox := range list.GetItems() {
		there[sandbox.GetMetadata().GetUid()] = true
	}
	for _, o := range all {
		if there[o.PodUID] {
			continue
		}
		t.log.WithFields(logrus.Fields{
			"pod": o.Namespace + "/" + o.Pod, "container": o.Container, "image": o.Image,
		}).Info("image override ended: the pod is gone")
		t.node.Overrides.Set(o.Slot(), nil)
	}
	t.node.Overrides.Flush()
}
