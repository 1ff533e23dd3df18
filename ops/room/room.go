// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package room finds out whether a pod has the memory and the process IDs for two containers of one
// slot at a time, and raises the pod's limit of memory for as long as there are two.
package room

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// What must be free in the pod for a container that is to wait at its gate. With runc 1.5.2 on
// kernel 6.18, cgroup v1 and two CPUs it takes 3.3 to 3.8 MiB there, 0.5 MiB of that the kernel's,
// and 6 to 8 processes and threads. With 3 MiB or 5 process IDs free runc does not come that far,
// and before that the kernel kills the incumbent if that is larger. These are four and three times
// as much: more CPUs mean more threads and more of the kernel's memory for each cgroup, and the
// incumbent may need some itself while it ends.
const (
	gateMemory = 16 << 20
	gatePids   = 24
	// gateSpare is what must stay free while a container waits at its gate, which in an upgrade may
	// take minutes.
	gateSpare = 8 << 20
)

// Node is what the rooms of all containers of the node share.
type Node struct {
	Runtime    *crinode.Client
	Switchover *switchover.Prober
	// Active returns the operations that have not finished. The caller holds no lock of one.
	Active func() []*operation.Operation

	limits sync.Mutex // held while the limits of pods are changed, see [cgroup.Raise]
}

// Container is the operation on one container, as its room sees it.
type Container struct {
	Operation *operation.Operation
	Index     int // of the container, in the operation
	Log       logrus.FieldLogger
	// Write and Note change the container's record, on disk. Note tells the log of a failure.
	Write func(func(rec *store.Container, status *opsv1.ContainerOperation)) error
	Note  func(func(rec *store.Container, status *opsv1.ContainerOperation))
	// Warn tells the user.
	Warn func(format string, args ...any)
	// Exited reports whether the kernel has told the end of the incumbent.
	Exited func() bool
	// Interrupted returns an error if the operation has come to its end otherwise.
	Interrupted func() error
}

// Room is the room in the pod of one container.
type Room struct {
	node *Node
	c    Container

	// pod is where the pod of a successor that waits at its gate is looked at; nil if that cannot
	// be.
	pod *cgroup.Pod
	// shortSince is since when that pod has had too little memory, by each look.
	shortSince time.Time
}

// Of returns the room of a container. It looks at nothing yet.
func (n *Node) Of(c Container) *Room { return &Room{node: n, c: c} }

func (r *Room) record() store.Container { return r.c.Operation.Container(r.c.Index).Record() }

// findPod finds the cgroups of the incumbent and its pod. An error says why they cannot be looked
// at: then nothing is known of room, and nothing is refused for the lack of it.
func (r *Room) findPod(ctx context.Context) (*cgroup.Pod, error) {
	id := r.record().Incumbent
	var info crinode.Info
	err := r.node.Runtime.Retry(ctx, func() (err error) {
		_, info, err = r.node.Runtime.Inspect(ctx, id)
		return err
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading container %s: %v", id, status.Convert(err).Message())
	case info.PID <= 0:
		return nil, errors.New("the runtime does not tell the container's process")
	}
	return r.node.Switchover.FindPod(info.PID, id)
}

// RefuseGate says why the successor must not be started up to its gate while the incumbent runs:
// the kernel would kill one of them for the memory that runc takes, and it prefers the larger one,
// or runc could not make its processes. Empty if the successor may be started.
func (r *Room) RefuseGate(ctx context.Context) string {
	pod, err := r.findPod(ctx)
	r.pod = pod
	if err == nil {
		var memory, pids cgroup.Room
		memory, err = r.settledMemory(ctx, pod)
		if err == nil && memory.Free < gateMemory {
			return fmt.Sprintf("the pod has %s, less than the %s that a container takes that waits at its gate",
				memoryOf(memory), mebi(gateMemory))
		}
		if err == nil {
			pids, err = pod.Pids()
		}
		if err == nil && pids.Free < gatePids {
			return fmt.Sprintf("the pod has %s, less than the %d that runc takes for a container that waits at "+
				"its gate",
				pidsOf(pids), gatePids)
		}
	}
	if err != nil {
		r.c.Log.WithError(err).Info("the room in the pod's cgroup is not known")
	}
	return ""
}

// settledMemory is the pod's room in memory. If that is too little for a gate, and only because the
// kernel may not have counted yet what it can take back, settledMemory looks again until the kernel
// has.
func (r *Room) settledMemory(ctx context.Context, pod *cgroup.Pod) (cgroup.Room, error) {
	const interval = 100 * time.Millisecond
	for until := time.Now().Add(cgroup.StatInterval); ; {
		memory, err := pod.Memory()
		if err != nil || !mayComeToFit(memory, gateMemory) || time.Now().After(until) || r.c.Exited() ||
			r.c.Interrupted() != nil {
			return memory, err
		}
		if crinode.Sleep(ctx, interval) != nil {
			return memory, nil
		}
	}
}

// Short says that the incumbent has come to need the memory that a successor takes which waits at
// its gate. Empty if the successor may go on waiting.
func (r *Room) Short(ctx context.Context) string {
	if r.pod == nil { // it was a process before this one that has looked there
		pod, err := r.findPod(ctx)
		if err != nil {
			return "" // nothing is known
		}
		r.pod = pod
	}
	memory, err := r.pod.Memory()
	if err != nil || memory.Free >= gateSpare || r.c.Exited() {
		r.shortSince = time.Time{}
		return "" // kubelet's stop comes, or it does not; nothing is known
	}
	if r.shortSince.IsZero() {
		r.shortSince = time.Now()
	}
	if mayComeToFit(memory, gateSpare) && time.Since(r.shortSince) < cgroup.StatInterval {
		return "" // the next look knows more
	}
	return fmt.Sprintf("the pod has come to have %s, less than the %s to spare", memoryOf(memory), mebi(gateSpare))
}

// Unstarted reports whether the successor is still to be started, and the incumbent runs beside
// which that would be.
func (r *Room) Unstarted(ctx context.Context) bool {
	rec := r.record()
	state, err := r.stateOf(ctx, rec.Incumbent)
	if err != nil || state != runtimeapi.ContainerState_CONTAINER_RUNNING || r.c.Exited() {
		return false
	}
	if rec.Successor == "" {
		return true
	}
	state, err = r.stateOf(ctx, rec.Successor)
	return err == nil && state == runtimeapi.ContainerState_CONTAINER_CREATED
}

func (r *Room) stateOf(ctx context.Context, id string) (runtimeapi.ContainerState, error) {
	st, err := r.node.Runtime.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	return st.GetStatus().GetState(), err
}

// mayComeToFit reports whether so many bytes do not fit by the kernel's last count and may by its
// next.
func mayComeToFit(room cgroup.Room, bytes int64) bool {
	return room.Free < bytes && room.Free+room.Unsettled >= bytes
}

// mebi tells bytes as people give them in a pod's spec.
func mebi(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func memoryOf(r cgroup.Room) string {
	s := fmt.Sprintf("%s of memory free (limit %s, %s used", mebi(max(0, r.Free)), mebi(r.Limit), mebi(r.Used))
	if r.Reclaimable > 0 {
		s += fmt.Sprintf(", of which %s is cache", mebi(r.Reclaimable))
	}
	return s + ", in " + r.At + ")"
}

func pidsOf(r cgroup.Room) string {
	return fmt.Sprintf("%d process IDs free (limit %d, %d used, in %s)", max(0, r.Free), r.Limit, r.Used, r.At)
}
