// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// Judge decides of all containers that the runtime has, once. Until it has succeeded, nobody knows
// what an earlier process may have left.
func (k *Keeper) Judge(ctx context.Context) error {
	if k.judged.Load() {
		return nil
	}
	select {
	case k.judging <- struct{}{}:
		defer func() { <-k.judging }()
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if k.judged.Load() {
		return nil
	}
	list, err := k.Node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	k.JudgeNew(ctx, list.GetContainers())
	k.judged.Store(true)
	k.View.Judged()
	return nil
}

// AwaitJudged returns when Judge has succeeded, or ctx ends.
func (k *Keeper) AwaitJudged(ctx context.Context) error {
	for !k.judged.Load() {
		err := k.Node.AwaitRuntime(ctx)
		if err == nil {
			err = k.Judge(ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			k.Log.WithError(err).
				Warn("the runtime does not list its containers; kubelet is told of none before it does")
			if err := crinode.Sleep(ctx, time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}

// JudgeNew decides of each container in the list whose token nobody has decided of.
func (k *Keeper) JudgeNew(ctx context.Context, list []*runtimeapi.Container) {
	slots := map[view.Slot][]*runtimeapi.Container{}
	open := map[view.Slot]bool{} // there is something to decide
	for _, c := range list {
		at := view.Slot{PodUID: c.GetLabels()[criclone.LabelPodUID], Container: c.GetLabels()[criclone.LabelContainer]}
		slots[at] = append(slots[at], c)
		open[at] = open[at] || k.undecided(tokenOf(c))
	}
	for at, undecided := range open {
		if undecided {
			k.judgeSlot(ctx, at, slots[at])
		}
	}
}

// judgeSlot is JudgeNew for the containers of one slot.
func (k *Keeper) judgeSlot(ctx context.Context, at view.Slot, list []*runtimeapi.Container) {
	byAge(list)
	incumbent := k.serves(ctx, list)
	l := &slot{k: k, at: at}
	var kept []string
	for _, c := range list {
		token := tokenOf(c)
		if !k.undecided(token) {
			continue
		}
		s := &stray{
			id: c.GetId(), token: token, sandbox: c.GetPodSandboxId(), labels: c.GetLabels(),
			pod:  c.GetLabels()[criclone.LabelPodNamespace] + "/" + c.GetLabels()[criclone.LabelPodName],
			runs: c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING,
		}
		isStray, left := k.isStray(c, token, incumbent), k.isLeftAlone(token)
		if left {
			kept = append(kept, token)
		}
		switch {
		case isStray && left:
			l.left = append(l.left, s)
		case isStray:
			l.strays = append(l.strays, s)
		default:
			k.View.Know(token)
			if c == incumbent && !left && k.mayWait(ctx, s) {
				l.waits = s
			}
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.Tokens.closed() {
		return // too late for anything to be lost
	}
	for _, c := range list {
		k.decided[tokenOf(c)] = true
	}
	for _, token := range kept {
		k.Tokens.Add(token) // so is its gate
	}
	if len(l.strays) == 0 && len(l.left) == 0 && l.waits == nil {
		return
	}
	l.hideLocked(incumbent, list[len(list)-1])
	k.slots = append(k.slots, l)
}

// hideLocked takes the slot and hides the strays that were found in it. The caller holds the
// keeper's mu.
func (l *slot) hideLocked(incumbent, newest *runtimeapi.Container) {
	if hold, err := l.k.View.TryClaim(l.at); err == nil {
		hold.Bind(cmp.Or(incumbent.GetPodSandboxId(), newest.GetPodSandboxId()), incumbent.GetId())
		l.hold = hold
	}
	for _, s := range l.strays {
		l.k.Tokens.Add(s.token) // so is its gate
		beside := ""
		if s.runs {
			beside = incumbent.GetId()
		}
		s.claim = l.k.View.Stray(l.at, s.sandbox, s.token, s.id, beside)
		l.k.Log.WithFields(s.fields()).Warn("hidden and to be taken away: a staged container that no operation knows")
	}
	for _, s := range l.left {
		s.claim = l.k.View.Stray(l.at, s.sandbox, s.token, s.id, "")
		l.k.left[l.at] = true
		l.k.Log.WithFields(s.fields()).
			Warn("hidden: a staged container of an operation that this version does not know; " +
				"it is taken away when kubelet wants its place")
	}
	if len(l.left) > 0 && l.hold != nil {
		l.hold.Drive(givesWay{})
	}
	if s := l.waits; s != nil {
		l.k.Tokens.Add(s.token)
	}
}

// undecided reports whether the token is one that neither an operation of this process has nor
// judge has met.
func (k *Keeper) undecided(token string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return token != "" && !k.Tokens.Has(token) && !k.decided[token]
}

// mayWait reports whether a container that runs may be waiting at its gate. Mostly its files tell;
// without any, all containers are asked.
func (k *Keeper) mayWait(ctx context.Context, s *stray) bool {
	if k.Switchover.Gate(s.token).Exists() {
		return true
	}
	if !k.Switchover.GatesLost() {
		return false
	}
	_, info, err := k.Node.Inspect(ctx, s.id)
	return err == nil && k.Switchover.Waits(info.PID, s.id)
}

// serves returns the container of a slot, by age, that runs longest: nil if none does. One that the
// runtime shows running although its process is gone does not.
func (k *Keeper) serves(ctx context.Context, list []*runtimeapi.Container) *runtimeapi.Container {
	list = slices.DeleteFunc(slices.Clone(list), func(c *runtimeapi.Container) bool {
		return c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING
	})
	for len(list) > 1 && k.isShell(ctx, list) {
		k.awaitEnd(ctx, list[0].GetId())
		list = list[1:]
	}
	if len(list) == 0 {
		return nil
	}
	return list[0]
}

// awaitEnd waits until the runtime knows that the container has ended, for as long as it may be
// behind the kernel: until then kubelet would be shown two that run.
func (k *Keeper) awaitEnd(ctx context.Context, id string) {
	for until := time.Now().Add(switchover.HookTimeout); time.Now().Before(until); {
		st, err := k.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return
		}
		if crinode.Sleep(ctx, 20*time.Millisecond) != nil {
			return
		}
	}
}

// isShell reports whether the first container has ended since the list was made, or its process is
// gone, by the kernel's word. The processes of the others tell whether this process can see the
// runtime's processes at all.
func (k *Keeper) isShell(ctx context.Context, list []*runtimeapi.Container) bool {
	st, info, err := k.Node.Inspect(ctx, list[0].GetId())
	switch {
	case status.Code(err) == codes.NotFound, err == nil && st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
		return true
	case err != nil, info.PID == 0, k.Switchover.OfContainer(info.PID, list[0].GetId()) == nil:
		return false
	}
	return slices.ContainsFunc(list[1:], func(c *runtimeapi.Container) bool {
		_, info, err := k.Node.Inspect(ctx, c.GetId())
		return err == nil && info.PID != 0 && k.Switchover.OfContainer(info.PID, c.GetId()) == nil
	})
}

// isStray reports whether a container whose token no unfinished operation has is one that kubelet
// must not see. incumbent is what serves in the slot; nil if nothing does.
func (k *Keeper) isStray(c *runtimeapi.Container, token string, incumbent *runtimeapi.Container) bool {
	k.mu.Lock()
	settled := k.settled[token] || k.incumbents[c.GetId()]
	k.mu.Unlock()
	switch {
	case c.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED:
		return true
	case settled || incumbent == nil || c == incumbent:
		return false
	default:
		return c.GetCreatedAt() > incumbent.GetCreatedAt()
	}
}

// list returns the containers of the slot that are in the sandbox, by age.
func (l *slot) list(ctx context.Context, sandbox string) ([]*runtimeapi.Container, error) {
	list, err := l.k.Node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{PodSandboxId: sandbox},
	})
	if err != nil {
		return nil, err
	}
	of := slices.DeleteFunc(list.GetContainers(), func(c *runtimeapi.Container) bool {
		return c.GetLabels()[criclone.LabelContainer] != l.at.Container
	})
	byAge(of)
	return of, nil
}

// byAge sorts containers, the oldest first.
func byAge(list []*runtimeapi.Container) {
	slices.SortFunc(list,
		func(a, b *runtimeapi.Container) int { return cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()) })
}
