// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/cgroup"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// What must be free in the pod for a container that is to wait at its gate. With runc 1.5.2 on kernel 6.18, cgroup v1 and two CPUs it
// takes 3.3 to 3.8 MiB there, 0.5 MiB of that the kernel's, and 6 to 8 processes and threads. With 3 MiB or 5 process IDs free runc
// does not come that far, and before that the kernel kills the incumbent if that is larger. These are four and three times as much: more
// CPUs mean more threads and more of the kernel's memory for each cgroup, and the incumbent may need some itself while it ends.
const (
	gateMemory = 16 << 20
	gatePids   = 24
	// gateSpare is what must stay free while a container waits at its gate, which in an upgrade may take minutes.
	gateSpare = 8 << 20
)

// podOf finds the cgroups of the incumbent and its pod. An error says why they cannot be looked at: then nothing is known of room, and
// nothing is refused for the lack of it.
func (r *Container) podOf(ctx context.Context) (*cgroup.Pod, error) {
	_, info, err := r.old.inspect(ctx)
	if err != nil {
		return nil, err
	}
	if info.PID <= 0 {
		return nil, errors.New("the runtime does not tell the container's process")
	}
	return r.node.Switchover.FindPod(info.PID, r.rec().Incumbent)
}

// noRoomForGate says why the successor must not be started up to its gate while the incumbent runs: the kernel would kill one of them
// for the memory that runc takes, and it prefers the larger one, or runc could not make its processes. Empty if it may be.
func (r *Container) noRoomForGate(ctx context.Context) string {
	pod, err := r.podOf(ctx)
	r.pod = pod
	if err == nil {
		var memory, pids cgroup.Room
		memory, err = r.settledMemory(ctx, pod)
		if err == nil && memory.Free < gateMemory {
			return fmt.Sprintf("the pod has %s, less than the %s that a container takes that waits at its gate", memoryOf(memory), mebi(gateMemory))
		}
		if err == nil {
			pids, err = pod.Pids()
		}
		if err == nil && pids.Free < gatePids {
			return fmt.Sprintf("the pod has %s, less than the %d that runc takes for a container that waits at its gate", pidsOf(pids), gatePids)
		}
	}
	if err != nil {
		r.log.WithError(err).Info("the room in the pod's cgroup is not known")
	}
	return ""
}

// settledMemory is the pod's room in memory. If that is too little for a gate, and only because the kernel may not have counted yet what it
// can take back, settledMemory looks again until the kernel has.
func (r *Container) settledMemory(ctx context.Context, pod *cgroup.Pod) (cgroup.Room, error) {
	const interval = 100 * time.Millisecond
	for until := time.Now().Add(cgroup.StatInterval); ; {
		memory, err := pod.Memory()
		if err != nil || !mayComeToFit(memory, gateMemory) || time.Now().After(until) || r.old.exit.Over() || r.interrupted() != nil {
			return memory, err
		}
		if crinode.Sleep(ctx, interval) != nil {
			return memory, nil
		}
	}
}

// mayComeToFit reports whether so many bytes do not fit by the kernel's last count and may by its next.
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

// stopFirstFor has the incumbent stopped before the successor is started, which is staged anew. containerd makes a container's
// processes only at StartContainer (internal/cri/server/container_start.go NewTask): until then it takes nothing of the pod.
func (s *switcher) stopFirstFor(ctx context.Context, why string) error {
	s.c.warn("%s: the old container is stopped before the new one is started", why)
	s.c.stager.withoutGate()
	return s.c.stager.stageAnew(ctx, "")
}

// makeRoom has a successor that waits at its gate end, and another one staged that is started when the incumbent has ended, if the
// incumbent has come to need the memory.
func (r *Container) makeRoom(ctx context.Context) error {
	if r.switcher.gate == nil {
		return nil
	}
	if r.pod == nil { // it was a process before this one that has looked there
		pod, err := r.podOf(ctx)
		if err != nil {
			return nil // nothing is known
		}
		r.pod = pod
	}
	memory, err := r.pod.Memory()
	if err != nil || memory.Free >= gateSpare || r.old.exit.Over() {
		r.shortSince = time.Time{}
		return nil // kubelet's stop comes, or it does not; nothing is known
	}
	if r.shortSince.IsZero() {
		r.shortSince = time.Now()
	}
	if mayComeToFit(memory, gateSpare) && time.Since(r.shortSince) < cgroup.StatInterval {
		return nil // the next look knows more
	}
	r.stager.stopWithin(ctx, r.successor(), crinode.MinGrace)
	if err := r.switcher.stopFirstFor(ctx, fmt.Sprintf("the pod has come to have %s, less than the %s to spare", memoryOf(memory), mebi(gateSpare))); err != nil {
		return err
	}
	if err := r.stager.ensureStaged(ctx); err != nil {
		return err
	}
	return r.write(func(c *store.Container, op *opsv1.ContainerOperation) { op.SuccessorId = c.Successor })
}

// unstarted reports whether the successor is still to be started, and the incumbent runs beside which that would be.
func (s *switcher) unstarted(ctx context.Context) bool {
	if runs, err := s.c.old.runs(ctx); err != nil || !runs || s.c.old.exit.Over() {
		return false
	}
	id := s.c.rec().Successor
	if id == "" {
		return true
	}
	st, err := s.c.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	return err == nil && st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_CREATED
}

// memoryOfSuccessor is how much memory the successor may come to use: its limit or, without one, what the incumbent uses.
func (r *Container) memoryOfSuccessor(pod *cgroup.Pod) (int64, error) {
	if limit := r.resources().GetMemoryLimitInBytes(); limit > 0 {
		return limit, nil
	}
	return pod.MemoryUsed()
}

// resources are those that the successor gets.
func (r *Container) resources() *runtimeapi.LinuxContainerResources {
	return criclone.OverlayResources(r.old.request.GetConfig().GetLinux().GetResources(), r.old.applied)
}

// roomBeside is nil if the successor may run beside the incumbent: the node can afford its memory, for which the pod's limit is
// raised, and the pod has the process IDs and huge pages. If nothing is known of that, it may.
func (r *Container) roomBeside(ctx context.Context) error {
	pod, err := r.podOf(ctx)
	if err != nil {
		r.log.WithError(err).Info("the room in the pod's cgroup is not known")
		return nil
	}
	refuse := func(format string, args ...any) error {
		return operation.Failf(opsv1.ReasonInsufficientResources, "the new container cannot run beside the old one, "+
			"which goes on: "+format+"; without StartFirst the old one is stopped first", args...)
	}
	need, err := r.memoryOfSuccessor(pod)
	if err == nil {
		var above cgroup.Room
		if above, err = pod.MemoryAbove(); err == nil && above.Free < need {
			return refuse("it may use %s, and outside of the pod there is %s", mebi(need), memoryOf(above))
		}
	}
	if err != nil {
		r.warn("memory for two containers at once cannot be looked at: %v", err)
	}
	pids, err := pod.Pids()
	if err == nil {
		var used int64
		if used, err = pod.PidsUsed(); err == nil && pids.Free < max(used, gatePids) {
			return refuse("the old one has %d processes and threads, and the pod has %s", used, pidsOf(pids))
		}
	}
	if err != nil {
		r.warn("process IDs for two containers at once cannot be looked at: %v", err)
	}
	for _, l := range r.resources().GetHugepageLimits() {
		room, err := pod.Hugepages(l.GetPageSize())
		switch {
		case err != nil:
			r.warn("huge pages for two containers at once cannot be looked at: %v", err)
		case l.GetLimit() > 0 && room.Free < int64(min(l.GetLimit(), uint64(cgroup.Unlimited))):
			return refuse("it may use %s of huge pages of %s, and the pod has %s left of %s", mebi(int64(l.GetLimit())), l.GetPageSize(), mebi(max(0, room.Free)), mebi(room.Limit))
		}
	}
	return nil
}

// raise makes room in the pod's limit of memory for the successor to run beside the incumbent, if it has not been started yet. The error
// says why there is none; then nothing has been touched.
func (r *Container) raise(ctx context.Context) error {
	started := !r.switcher.unstarted(ctx)
	if !started {
		if err := r.roomBeside(ctx); err != nil {
			return err
		}
	}
	r.node.Limits.Lock()
	defer r.node.Limits.Unlock()
	rec, others := r.rec(), r.raises()
	if rec.Raised != nil { // by a process before this one, or that was about to
		if _, err := rec.Raised.Apply(others); err != nil {
			r.warn("the pod's limit of memory was not raised: %v", err)
		}
		return nil
	}
	pod, err := r.podOf(ctx)
	if err != nil || started {
		return nil
	}
	need, err := r.memoryOfSuccessor(pod)
	if err != nil {
		return nil // said above
	}
	plan, err := pod.PlanRaise(need, others)
	if err == nil && plan != nil {
		if err := r.write(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Raised = plan }); err != nil {
			return err
		}
		var applied bool
		if applied, err = plan.Apply(others); err == nil && applied {
			r.log.WithField("from", plan.Base).WithField("by", plan.By).Info("the pod's limit of memory is raised")
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
	return operation.Failf(opsv1.ReasonInsufficientResources, "the new container cannot run beside the old one, which goes "+
		"on: it may use %s, the pod has %s, and %s; without StartFirst the old one is stopped first",
		mebi(need), memoryOf(room), why)
}

// raises are those in force of all other containers. The caller holds limits.
func (r *Container) raises() []cgroup.Raise {
	var all []cgroup.Raise
	for _, o := range r.node.Active() {
		for i, c := range o.Records() {
			if c.Raised != nil && (o != r.op || i != r.index) {
				all = append(all, *c.Raised)
			}
		}
	}
	return all
}

// lowerPatience bounds the wait for memory to be given back that is in use although one of the two containers has ended.
const lowerPatience = 10 * time.Second

// lower takes back what raise has done, when one of the two containers has ended. It returns false if ctx ended before that was possible.
func (r *Container) lower(ctx context.Context) bool {
	if r.rec().Raised == nil {
		return true
	}
	for until := time.Now().Add(lowerPatience); ; {
		err := r.lowerOnce()
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if !errors.Is(err, cgroup.ErrInUse) || time.Now().After(until) {
			raised := r.rec().Raised
			r.warn("the pod's limit of memory stays %s higher than its %s: %v; kubelet sets it when the pod is resized", mebi(raised.By), mebi(raised.Base), err)
			return true
		}
		if crinode.Sleep(ctx, 100*time.Millisecond) != nil {
			return false
		}
	}
}

func (r *Container) lowerOnce() error {
	r.node.Limits.Lock()
	defer r.node.Limits.Unlock()
	if err := r.rec().Raised.TakeBack(r.raises()); err != nil {
		return err
	}
	r.note(func(c *store.Container, _ *opsv1.ContainerOperation) { c.Raised = nil })
	return nil
}

// oomKilled is containerd's reason for a container of which the kernel has killed a process for lack of memory
// (internal/cri/server/events.go handleEvent TaskOOM). The kernel tells of the whole pod in v1, so that the container may go on with it.
const oomKilled = "OOMKilled"

// tellEnd warns of an incumbent that has not ended because it was asked to.
func (r *Container) tellEnd(ctx context.Context) {
	if r.claim == nil || r.rec().Incumbent == "" {
		return
	}
	st, err := r.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: r.rec().Incumbent})
	if err != nil {
		return // it is gone
	}
	s := st.GetStatus()
	const killed = 128 + 9
	oom := s.GetReason() == oomKilled
	if s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() != killed && !oom {
		return
	}
	ended := time.Unix(0, s.GetFinishedAt())
	if r.old.exit.Over() {
		ended = r.old.exit.At()
	}
	how := fmt.Sprintf("exit code %d", s.GetExitCode())
	if s.GetReason() != "" {
		how += ", " + s.GetReason()
	}
	why := ""
	if oom {
		why = " by the kernel, because memory had run out in its pod"
	}
	switch {
	case s.GetExitCode() != killed:
		r.warn("memory had run out in the pod of the old container (%s), and the kernel has killed a process there", how)
	case !r.switcher.asked.IsZero() && ended.Before(r.switcher.asked):
		r.warn("the old container was killed%s (%s) before it was asked to stop%s: it has not ended gracefully", why, how, r.besideAt(ended))
	case oom:
		r.warn("the old container was killed%s (%s)%s: it has not ended gracefully", why, how, r.besideAt(ended))
	}
}

// besideAt says what the successor did at that time, if that may have been the reason for something.
func (r *Container) besideAt(at time.Time) string {
	switch {
	case r.switcher.beside.IsZero() || at.Before(r.switcher.beside):
		return ""
	case r.switcher.besideUntil.IsZero() || at.Before(r.switcher.besideUntil.Add(switchover.HookTimeout)):
		return ", while the new one was being started beside it"
	default:
		return ", while the new one was there beside it"
	}
}

// besideErrors are what runc says of a start that may have failed because the incumbent has what the successor needs: memory, process
// IDs, a device, the name of a cgroup.
var besideErrors = []string{
	"procready not received",           // runc init ended before it could tell (libcontainer/process_linux.go)
	"can't get final child",            // its first stages did
	"oom-killed",                       // the kernel has killed it
	"cannot allocate memory",           // ENOMEM
	"resource temporarily unavailable", // EAGAIN: no process IDs left
	"device or resource busy",          // EBUSY
}

// besideFails reports whether a start has failed in a way that it may not fail in once the incumbent is gone.
func besideFails(err error) bool {
	var out *operation.Outcome
	if !errors.As(err, &out) || out.Reason != opsv1.ReasonStartFailed {
		return false
	}
	said := strings.ToLower(out.Message)
	return slices.ContainsFunc(besideErrors, func(e string) bool { return strings.Contains(said, e) })
}

// giveUpOverlap goes on as StopFirst does, because the successor has not started beside the incumbent, which is untouched.
func (s *switcher) giveUpOverlap(ctx context.Context, why error) error {
	if err := s.c.interrupted(); err != nil {
		return err
	}
	if !s.c.lower(ctx) {
		return ctx.Err()
	}
	s.c.warn("the new container does not start beside the old one (%v): the old one is stopped before the new one is started", why)
	s.c.stager.withoutGate()
	s.c.stopFirst = true
	s.c.handle.Set(func(c *store.Container, _ *opsv1.ContainerOperation) { // on disk with the new stage
		c.StopFirst = true
		if !s.c.kind.Adopted() {
			c.Step = store.StepStaged
		}
	})
	if err := s.c.stager.stageAnew(ctx, ""); err != nil {
		return err
	}
	return s.c.stager.ensureStaged(ctx)
}
