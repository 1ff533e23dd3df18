// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels that kubelet puts on containers (pkg/kubelet/types/labels.go).
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// life is what happened to one container, as containerd told it.
type life struct {
	id      string
	slot    string // pod UID/container
	attempt uint32
	created, started, stopped,
	deleted int
}

// ledger keeps the lives of all containers of the node, from containerd's own event stream, around
// the proxy.
type ledger struct {
	mu    sync.Mutex // guards all following fields
	lives map[string]*life
	err   error
}

func newLedger() *ledger { return &ledger{lives: map[string]*life{}} }

// follow reads events until ctx ends. ready is closed when none is missed any more.
func (l *ledger) follow(ctx context.Context, rt runtimeapi.RuntimeServiceClient) {
	stream, err := rt.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	for err == nil {
		var e *runtimeapi.ContainerEventResponse
		if e, err = stream.Recv(); err == nil {
			l.note(e)
		}
	}
	if ctx.Err() == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.err = fmt.Errorf("containerd's events broke off: %w", err)
	}
}

func (l *ledger) note(e *runtimeapi.ContainerEventResponse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.lives[e.GetContainerId()]
	if c == nil {
		i := slices.IndexFunc(e.GetContainersStatuses(),
			func(s *runtimeapi.ContainerStatus) bool { return s.GetId() == e.GetContainerId() })
		if i < 0 {
			return // a sandbox
		}
		s := e.GetContainersStatuses()[i]
		c = &life{id: s.GetId(), slot: s.GetLabels()[labelPodUID] + "/" + s.GetLabels()[labelContainer],
			attempt: s.GetMetadata().GetAttempt()}
		l.lives[c.id] = c
	}
	switch e.GetContainerEventType() {
	case runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT:
		c.created++
	case runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT:
		c.started++
	case runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT:
		c.stopped++
	case runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT:
		c.deleted++
	}
}

// bySlot returns the lives of each slot, by pod UID/container, in the order of their attempts.
func (l *ledger) bySlot() (map[string][]life, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string][]life{}
	for _, c := range l.lives {
		out[c.slot] = append(out[c.slot], *c)
	}
	for _, lives := range out {
		slices.SortFunc(lives, func(a, b life) int { return int(a.attempt) - int(b.attempt) })
	}
	return out, l.err
}

// attempts checks that a slot's containers were attempts 0 to restarts, each created and started
// once, and each but the last one stopped once.
func attempts(lives []life, restarts int) error {
	var errs []error
	if len(lives) != restarts+1 {
		errs = append(errs, fmt.Errorf("containerd made %d containers for %d restarts", len(lives), restarts))
	}
	seen := map[uint32]int{}
	for _, c := range lives {
		seen[c.attempt]++
		stopped := 1
		if int(c.attempt) == restarts {
			stopped = 0
		}
		if c.created != 1 || c.started != 1 || c.stopped != stopped {
			errs = append(errs, fmt.Errorf("attempt %d (%.12s) was created, started and stopped %d, %d and %d times",
				c.attempt, c.id, c.created, c.started, c.stopped))
		}
	}
	for n := range uint32(restarts + 1) {
		if seen[n] != 1 {
			errs = append(errs, fmt.Errorf("attempt %d was there %d times", n, seen[n]))
		}
		delete(seen, n)
	}
	if len(seen) > 0 {
		errs = append(errs, fmt.Errorf("attempts %v are beyond the restarts", slices.Sorted(maps.Keys(seen))))
	}
	return errors.Join(errs...)
}
