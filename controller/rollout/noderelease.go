// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller"
)

const (
	// releaseTimeout is how long to try nodes that do not answer. After that their pins expire by themselves.
	releasePatience = 2 * time.Minute
	// releaseParallel is how many nodes are told at once.
	releaseWidth = 32
)

// releaseOnce tells each node once, and returns the nodes that have to be told again.
func (d *driver) releaseOnce(ctx context.Context, nodes []controller.Node, owner string) []controller.Node {
	var mu sync.Mutex
	var left []controller.Node
	var g errgroup.Group
	g.SetLimit(releaseWidth)
	for _, n := range nodes {
		g.Go(func() error {
			if _, err := d.nodes.ReleasePins(ctx, n, owner, ""); err != nil && !troubleOf(err).final {
				mu.Lock()
				defer mu.Unlock()
				left = append(left, n)
			}
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return left
}

// release tells the nodes of these pods, and all nodes that were told anything, that the rollout has ended. It forgets all pods. The
// channel is closed when the nodes were told.
func (s *session) release(ctx context.Context, pods []*corev1.Pod) chan struct{} {
	done := make(chan struct{})
	for _, pod := range pods {
		if pod.Spec.NodeName == "" || s.state.nodes[pod.Spec.NodeName].Name != "" {
			continue
		}
		if node, err := s.driver.node(ctx, pod); err == nil {
			s.state.nodes[node.Name] = node
		}
	}
	var left []controller.Node
	for _, name := range slices.Sorted(maps.Keys(s.state.nodes)) {
		left = append(left, s.state.nodes[name])
	}
	owner, wake := ownerOf(s.rollout), s.state.wake
	s.state.close()
	if len(left) == 0 {
		close(done)
		return done
	}
	s.driver.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, releasePatience)
		defer cancel()
		for wait := tellPause; ; wait = min(2*wait, tellPauseMax) {
			left = s.driver.releaseOnce(ctx, left, owner)
			if len(left) == 0 || !pause(ctx, wait) {
				break
			}
		}
		if len(left) > 0 {
			s.log.WithField("nodes", len(left)).Warn("nodes could not be told that the rollout has ended: what they pin expires")
		}
		close(done)
		wake()
	})
	return done
}
