// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package room

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// need is how much memory a successor with these resources may come to use: its limit or, without
// one, what the incumbent uses.
func need(pod *cgroup.Pod, resources *runtimeapi.LinuxContainerResources) (int64, error) {
	if limit := resources.GetMemoryLimitInBytes(); limit > 0 {
		return limit, nil
	}
	return pod.MemoryUsed()
}

// Beside returns nil if a successor with these resources may run beside the incumbent: the node can
// afford its memory, for which the pod's limit is raised, and the pod has the process IDs and huge
// pages. If nothing is known of that, it may. Otherwise the error is an [*operation.Outcome].
func (r *Room) Beside(ctx context.Context, resources *runtimeapi.LinuxContainerResources) error {
	pod, err := r.findPod(ctx)
	if err != nil {
		r.c.Log.WithError(err).Info("the room in the pod's cgroup is not known")
		return nil
	}
	refuse := func(format string, args ...any) error {
		return operation.Failf(opsv1.ReasonInsufficientResources, "the new container cannot run beside the old one, "+
			"which goes on: "+format+"; without StartFirst the old one is stopped first", args...)
	}
	need, err := need(pod, resources)
	if err == nil {
		var above cgroup.Room
		if above, err = pod.MemoryAbove(); err == nil && above.Free < need {
			return refuse("it may use %s, and outside of the pod there is %s", mebi(need), memoryOf(above))
		}
	}
	if err != nil {
		r.c.Warn("memory for two containers at once cannot be looked at: %v", err)
	}
	pids, err := pod.Pids()
	if err == nil {
		var used int64
		if used, err = pod.PidsUsed(); err == nil && pids.Free < max(used, gatePids) {
			return refuse("the old one has %d processes and threads, and the pod has %s", used, pidsOf(pids))
		}
	}
	if err != nil {
		r.c.Warn("process IDs for two containers at once cannot be looked at: %v", err)
	}
	for _, l := range resources.GetHugepageLimits() {
		room, err := pod.Hugepages(l.GetPageSize())
		switch {
		case err != nil:
			r.c.Warn("huge pages for two containers at once cannot be looked at: %v", err)
		case l.GetLimit() > 0 && room.Free < int64(min(l.GetLimit(), uint64(cgroup.Unlimited))):
			return refuse("it may use %s of huge pages of %s, and the pod has %s left of %s",
				mebi(int64(l.GetLimit())), l.GetPageSize(), mebi(max(0, room.Free)), mebi(room.Limit))
		}
	}
	return nil
}

// Raise makes room in the pod's limit of memory for a successor with these resources to run beside
// the incumbent, if it has not been started yet. The error says why there is none; then nothing has
// been touched.
func (r *Room) Raise(ctx context.Context, resources *runtimeapi.LinuxContainerResources) error {
	started := !r.Unstarted(ctx)
	if !started {
		if err := r.Beside(ctx, resources); err != nil {
			return err
		}
	}
	r.node.limits.Lock()
	defer r.node.limits.Unlock()
	rec, others := r.record(), r.others()
	if rec.Raised != nil { // by a process before this one, or that was about to
		if _, err := rec.Raised.Apply(others); err != nil {
			r.c.Warn("the pod's limit of memory was not raised: %v", err)
		}
		return nil
	}
	pod, err := r.findPod(ctx)
	if err != nil || started {
		return nil
	}
	need, err := need(pod, resources)
	if err != nil {
		return nil // said above
	}
	plan, err := pod.PlanRaise(need, others)
	if err == nil && plan != nil {
		if err := r.c.Write(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Raised = plan }); err != nil {
			return err
		}
		var applied bool
		if applied, err = plan.Apply(others); err == nil && applied {
			r.c.Log.WithField("from", plan.Base).WithField("by", plan.By).Info("the pod's limit of memory is raised")
			return nil
		}
	}
	room, rerr := pod.Memory()
	if rerr != nil || room.Free >= need {
		return nil // there is room without that
	}
	why := "somebody else is changing the pod's limit"
	if err != nil {
		why = "the pod's limit cannot be raised: " + err.Error()
		if errors.Is(err, unix.EROFS) {
			why += " (cri-proxy's unit is an older one, which has ProtectControlGroups=: run cri-proxy install again)"
		}
	}
	return operation.Failf(opsv1.ReasonInsufficientResources, "the new container cannot run beside the old one, "+
		"which goes on: it may use %s, the pod has %s, and %s; without StartFirst the old one is stopped first",
		mebi(need), memoryOf(room), why)
}

// others are the raises in force of all other containers. The caller holds limits.
func (r *Room) others() []cgroup.Raise {
	var all []cgroup.Raise
	for _, o := range r.node.Active() {
		for i, c := range o.Records() {
			if c.Raised != nil && (o != r.c.Operation || i != r.c.Index) {
				all = append(all, *c.Raised)
			}
		}
	}
	return all
}

// lowerTimeout bounds the wait for memory to be given back that is in use although one of the two
// containers has ended.
const lowerTimeout = 10 * time.Second

// Lower takes back what Raise has done, when one of the two containers has ended. It returns false
// if ctx ended before that was possible.
func (r *Room) Lower(ctx context.Context) bool {
	for until := time.Now().Add(lowerTimeout); ; {
		err := r.TryLower()
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if !errors.Is(err, cgroup.ErrInUse) || time.Now().After(until) {
			raised := r.record().Raised
			r.c.Warn("the pod's limit of memory stays %s higher than its %s: %v; kubelet sets it when the pod is "+
				"resized",
				mebi(raised.By), mebi(raised.Base), err)
			return true
		}
		if crinode.Sleep(ctx, 100*time.Millisecond) != nil {
			return false
		}
	}
}

// TryLower is Lower, once. [cgroup.ErrInUse] means that the memory is in use.
func (r *Room) TryLower() error {
	raised := r.record().Raised
	if raised == nil {
		return nil
	}
	r.node.limits.Lock()
	defer r.node.limits.Unlock()
	if err := raised.TakeBack(r.others()); err != nil {
		return err
	}
	r.c.Note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Raised = nil })
	return nil
}
