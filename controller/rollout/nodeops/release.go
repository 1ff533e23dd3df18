// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

const (
	// releaseTimeout is how long to try nodes that do not answer. After that their pins expire by
	// themselves.
	releaseTimeout = 2 * time.Minute
	// releaseParallel is how many nodes are told at once.
	releaseParallel = 32
)

// releaseOnce tells each node once, and returns the nodes that have to be told again.
func (d *Driver) releaseOnce(ctx context.Context, told []nodes.Node, owner string) []nodes.Node {
	var mu sync.Mutex
	var left []nodes.Node
	var g errgroup.Group
	g.SetLimit(releaseParallel)
	for _, n := range told {
		g.Go(func() error {
			if _, err := d.Nodes.ReleasePins(ctx, n, owner, ""); err != nil && !troubleOf(err).final {
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

// Release tells the nodes of these pods, and all nodes that were told anything, that the rollout
// has ended. It forgets all pods. The channel is closed when the nodes were told.
func (s *Session) Release(ctx context.Context, pods []*corev1.Pod) chan struct{} {
	done := make(chan struct{})
	for _, pod := range pods {
		if pod.Spec.NodeName == "" || s.State.nodes[pod.Spec.NodeName].Name != "" {
			continue
		}
		if node, err := s.Driver.node(ctx, pod); err == nil {
			s.State.nodes[node.Name] = node
		}
	}
	var left []nodes.Node
	for _, name := range objects.SortedKeys(s.State.nodes) {
		left = append(left, s.State.nodes[name])
	}
	owner := evaluate.OwnerOf(s.Rollout)
	s.State.Close()
	if len(left) == 0 {
		close(done)
		return done
	}
	s.Driver.Workers.Do(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
		defer cancel()
		for tries := 0; len(left) > 0 && (tries == 0 || retry.Sleep(ctx, backOff(tries-1))); tries++ {
			left = s.Driver.releaseOnce(ctx, left, owner)
		}
		if len(left) > 0 {
			s.Log.WithField("nodes", len(left)).Warn(
				"nodes could not be told that the rollout has ended: what they pin expires")
		}
		close(done)
		s.State.wake()
	})
	return done
}
