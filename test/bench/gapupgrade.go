// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// The large image of the ways that begin without it on the node.
const (
	absentLayers = 4
	absentMiB    = 125
)

// addAbsent adds the ways in which the new image is not on the node: kubelet alone, and an upgrade
// by cri-proxy. Each time it is an image of its own: of one that has been removed, containers that
// are gone may keep the layers for a while.
func (g *gapBench) addAbsent(direct, gate *testbed.Node, all []*way) []*way {
	var fresh *largeImage
	pushed := 0
	push := func(ctx context.Context) (err error) {
		pushed++
		fresh, err = pushLarge(ctx, g.bed, strconv.Itoa(pushed), absentLayers, absentMiB)
		if err == nil {
			g.report.AbsentMiB = fresh.mib()
		}
		return err
	}
	title := fmt.Sprintf("absent, %d MiB", absentLayers*absentMiB)
	return append(all,
		&way{name: "kubelet-absent", title: "kubelet alone: image patched, " + title, node: direct, perPod: 1,
			every: absentEvery, create: g.plainPod(direct), ready: push,
			restart: func(ctx context.Context, p *gapPod, _ func(string)) (*opsv1.ContainerOperation, error) {
				return nil, g.setImage(ctx, p, fresh.ref)
			}},
		&way{name: "upgrade-absent", title: "cri-proxy, upgrade: image " + title, method: "gate", node: gate, perPod: 1,
			every: absentEvery, create: g.plainPod(gate), ready: push,
			restart: g.upgrade(g.nodeOps[gate], opsv1.Order_ORDER_STOP_FIRST,
				func(*gapPod) string { return fresh.ref })},
	)
}

// absentEvery is in how many rounds the ways with a large image are measured once: a pull takes
// seconds, and its time does not vary as gaps do.
const absentEvery = 2

// otherImage is what patchImage changes a pod to.
func (g *gapBench) otherImage(p *gapPod) string {
	if image := g.bed.Image("app:2"); p.image != image {
		return image
	}
	return g.bed.Image("app:1")
}

// upgrade returns a way's change of the image by an operation of the node and a patch of the pod's
// spec.
func (g *gapBench) upgrade(
	o *nodeOps, order opsv1.Order, image func(*gapPod) string,
) func(context.Context, *gapPod, func(string)) (*opsv1.ContainerOperation, error) {
	return func(ctx context.Context, p *gapPod, _ func(string)) (*opsv1.ContainerOperation, error) {
		o.mu.Lock()
		o.sent++
		uid := fmt.Sprintf("bench-%s-%d", p.name, o.sent)
		o.mu.Unlock()
		to := image(p)
		c := &opsv1.ContainerUpgrade{Name: gapContainer, Image: to, Order: order}
		if order == opsv1.Order_ORDER_START_FIRST {
			c.MinReadySeconds = minReady
		}
		if _, err := o.client.PrepareUpgrade(ctx, &opsv1.PrepareUpgradeRequest{
			Uid: uid, Requester: "bench", Pod: &opsv1.PodRef{Namespace: gapNamespace, Name: p.name, Uid: p.uid},
			Containers: []*opsv1.ContainerUpgrade{c},
		}); err != nil {
			return nil, err
		}
		if _, err := o.until(ctx, uid, opsv1.Phase_PHASE_PREPARED); err != nil {
			return nil, err
		}
		if err := testbed.CommitUpgrade(ctx, o.client, uid); err != nil {
			return nil, err
		}
		if _, err := o.until(ctx, uid, opsv1.Phase_PHASE_ARMED); err != nil {
			return nil, err
		}
		if err := g.setImage(ctx, p, to); err != nil {
			return nil, err
		}
		return o.until(ctx, uid, opsv1.Phase_PHASE_SUCCEEDED)
	}
}

// until waits until the operation is in the phase, and returns its one container.
func (o *nodeOps) until(ctx context.Context, uid string, phase opsv1.Phase) (*opsv1.ContainerOperation, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the watch
	defer cancel()
	watch, err := o.client.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid})
	if err != nil {
		return nil, err
	}
	for {
		op, err := watch.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("the node ended the watch of operation %s", uid)
		case err != nil:
			return nil, err
		case op.GetPhase() == phase && len(op.GetContainers()) == 1:
			return op.GetContainers()[0], nil
		case op.GetFinishTime() != nil:
			return nil, fmt.Errorf("the node says: %s: %s", op.GetPhase(), op.GetMessage())
		}
	}
}
