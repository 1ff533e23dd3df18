// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// A container that an operation has made keeps its annotation for life, and an operation that has ended is forgotten after an hour. So a token that
// the journal does not know is mostly that of a container that kubelet has long taken over. But the journal can be lost while a successor is hidden:
// damaged, deleted, put back from a copy. Then the runtime's list is all there is to go by:
//
//   - one that was never started is ours alone: kubelet starts at once what it makes;
//   - one that is newer than a running one of its slot is a successor that has not taken over: an incumbent never runs on beside it;
//   - any other is what kubelet has to go by, whether it runs or has ended. If it waits at its gate, its incumbent has ended, and it passes.
//
// The first two are hidden and taken away, with their gates. kubelet's policy, and its own next call, deal with what is left.

// lostSlot is a slot with containers of operations that no journal knows. They hold it until they have been taken care of, so that neither an
// operation nor a creation of kubelet's comes in between.
type lostSlot struct {
	slot   interceptors.Slot
	hold   *interceptors.Claim // nil: an operation of this process has the slot, or kubelet is creating in it
	strays []*stray
	// waits is a container that is to pass its gate; nil for none.
	waits *stray
	// left has those of operations that this binary does not understand: hidden, and not taken away unless kubelet wants the slot.
	left []*stray
}

// stray is one of them.
type stray struct {
	id, token string
	pod       string // namespace/name
	labels    map[string]string
	sandbox   string
	runs      bool                // it was listed running, and what runs beside it may be masked
	claim     *interceptors.Claim // hides it; nil if it is shown
}

// Judge implements [interceptors.Judge]. Until it has succeeded once nothing is known of what an earlier process may have left.
func (e *Engine) Judge(ctx context.Context) error {
	if e.judged.Load() {
		return nil
	}
	select {
	case e.judging <- struct{}{}:
		defer func() { <-e.judging }()
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if e.judged.Load() {
		return nil
	}
	list, err := e.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	e.judge(ctx, list.GetContainers())
	e.judged.Store(true)
	e.node.View.Judged()
	return nil
}

// awaitJudged returns when Judge has succeeded, or ctx ends.
func (e *Engine) awaitJudged(ctx context.Context) error {
	for !e.judged.Load() {
		err := e.node.AwaitRuntime(ctx)
		if err == nil {
			err = e.Judge(ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			e.log.WithError(err).Warn("the runtime does not list its containers; kubelet is told of none before it does")
			if err := crinode.Sleep(ctx, time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}

// judge decides of each container in the list whose token nobody has decided of.
func (e *Engine) judge(ctx context.Context, list []*runtimeapi.Container) {
	slots := map[interceptors.Slot][]*runtimeapi.Container{}
	open := map[interceptors.Slot]bool{} // there is something to decide
	for _, c := range list {
		slot := interceptors.Slot{PodUID: c.GetLabels()[criclone.LabelPodUID], Container: c.GetLabels()[criclone.LabelContainer]}
		slots[slot] = append(slots[slot], c)
		token := c.GetAnnotations()[interceptors.StagedAnnotation]
		open[slot] = open[slot] || e.undecided(token)
	}
	for slot, undecided := range open {
		if undecided {
			e.judgeSlot(ctx, slot, slots[slot])
		}
	}
}

// judgeSlot is judge for the containers of one slot.
func (e *Engine) judgeSlot(ctx context.Context, slot interceptors.Slot, list []*runtimeapi.Container) {
	slices.SortFunc(list, func(a, b *runtimeapi.Container) int { return cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()) })
	incumbent := e.serves(ctx, list)
	lost := &lostSlot{slot: slot}
	var kept []string
	for _, c := range list {
		token := c.GetAnnotations()[interceptors.StagedAnnotation]
		if !e.undecided(token) {
			continue
		}
		s := &stray{
			id: c.GetId(), token: token, sandbox: c.GetPodSandboxId(), labels: c.GetLabels(),
			pod:  c.GetLabels()[criclone.LabelPodNamespace] + "/" + c.GetLabels()[criclone.LabelPodName],
			runs: c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING,
		}
		stray, left := e.isStray(c, token, incumbent), e.isLeftAlone(token)
		if left {
			kept = append(kept, token)
		}
		switch {
		case stray && left:
			lost.left = append(lost.left, s)
		case stray:
			lost.strays = append(lost.strays, s)
		default:
			e.node.View.Know(token)
			if c == incumbent && !left && e.mayWait(ctx, s) {
				lost.waits = s
			}
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tokens == nil {
		return // too late for anything to be lost
	}
	for _, c := range list {
		e.decided[c.GetAnnotations()[interceptors.StagedAnnotation]] = true
	}
	for _, token := range kept {
		e.tokens[token] = true // so is its gate
	}
	if len(lost.strays) == 0 && len(lost.left) == 0 && lost.waits == nil {
		return
	}
	if hold, err := e.node.View.TryClaim(slot); err == nil {
		newest := list[len(list)-1]
		hold.Bind(cmp.Or(incumbent.GetPodSandboxId(), newest.GetPodSandboxId()), incumbent.GetId())
		lost.hold = hold
	}
	for _, s := range lost.strays {
		e.tokens[s.token] = true // so is its gate
		beside := ""
		if s.runs {
			beside = incumbent.GetId()
		}
		s.claim = e.node.View.Stray(slot, s.sandbox, s.token, s.id, beside)
		e.log.WithFields(s.fields()).Warn("hidden and to be taken away: a staged container that no operation knows")
	}
	for _, s := range lost.left {
		s.claim = e.node.View.Stray(slot, s.sandbox, s.token, s.id, "")
		e.leftSlots[slot] = s.token
		e.log.WithFields(s.fields()).Warn("hidden: a staged container of an operation that this version does not know; it is taken away when kubelet wants its place")
	}
	if len(lost.left) > 0 && lost.hold != nil {
		lost.hold.Drive(givesWay{})
	}
	if s := lost.waits; s != nil {
		e.tokens[s.token] = true
	}
	e.lost = append(e.lost, lost)
}

// undecided reports whether the token is one that neither an operation of this process has nor judge has met.
func (e *Engine) undecided(token string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return token != "" && !e.tokens[token] && !e.decided[token]
}

// mayWait reports whether a container that runs may be waiting at its gate. Mostly its files tell; without any, all containers are asked.
func (e *Engine) mayWait(ctx context.Context, s *stray) bool {
	if e.node.Switchover.Gate(s.token).Exists() {
		return true
	}
	if !e.node.Switchover.GatesLost() {
		return false
	}
	_, info, err := e.node.Inspect(ctx, s.id)
	return err == nil && e.node.Switchover.Waits(info.PID, s.id)
}

// keepToken keeps the gate of the token from being taken for one that nobody knows, as long as those are looked for.
func (e *Engine) keepToken(token string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tokens != nil {
		e.tokens[token] = true
	}
}

// serves returns the container of a slot, by age, that runs longest: nil if none does. One that the runtime shows running although its process is gone
// does not.
func (e *Engine) serves(ctx context.Context, list []*runtimeapi.Container) *runtimeapi.Container {
	list = slices.DeleteFunc(slices.Clone(list), func(c *runtimeapi.Container) bool {
		return c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING
	})
	for len(list) > 1 && e.isShell(ctx, list) {
		e.awaitEnd(ctx, list[0].GetId())
		list = list[1:]
	}
	if len(list) == 0 {
		return nil
	}
	return list[0]
}

// awaitEnd waits until the runtime knows that the container has ended, for as long as it may be behind the kernel: until then kubelet would
// be shown two that run.
func (e *Engine) awaitEnd(ctx context.Context, id string) {
	for until := time.Now().Add(switchover.HookTimeout); time.Now().Before(until); {
		st, err := e.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING || crinode.Sleep(ctx, 20*time.Millisecond) != nil {
			return
		}
	}
}

// isShell reports whether the first one has ended since the list was made, or its process is gone, by the kernel's word. That this process can see
// the runtime's processes at all is told by those of the others.
func (e *Engine) isShell(ctx context.Context, list []*runtimeapi.Container) bool {
	st, info, err := e.node.Inspect(ctx, list[0].GetId())
	switch {
	case status.Code(err) == codes.NotFound, err == nil && st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
		return true
	case err != nil, info.PID == 0, e.node.Switchover.OfContainer(info.PID, list[0].GetId()) == nil:
		return false
	}
	return slices.ContainsFunc(list[1:], func(c *runtimeapi.Container) bool {
		_, info, err := e.node.Inspect(ctx, c.GetId())
		return err == nil && info.PID != 0 && e.node.Switchover.OfContainer(info.PID, c.GetId()) == nil
	})
}

// isStray reports whether a container whose token no unfinished operation has is one that kubelet must not see. incumbent is what
// serves in the slot; nil if nothing does.
func (e *Engine) isStray(c *runtimeapi.Container, token string, incumbent *runtimeapi.Container) bool {
	e.mu.Lock()
	settled := e.settled[token] || e.incumbents[c.GetId()]
	e.mu.Unlock()
	switch {
	case c.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED:
		return true
	case settled || incumbent == nil || c == incumbent:
		return false
	default:
		return c.GetCreatedAt() > incumbent.GetCreatedAt()
	}
}

func (s *stray) fields() logrus.Fields {
	return logrus.Fields{"pod": s.pod, "container": s.labels[criclone.LabelContainer], "id": s.id}
}

// takeLost returns the slots that are to be taken care of.
func (e *Engine) takeLost() []*lostSlot {
	e.mu.Lock()
	defer e.mu.Unlock()
	lost := e.lost
	e.lost = nil
	return lost
}

// clearLost takes care of the slots that are left, each by itself. wg owns that.
func (e *Engine) clearLost(ctx context.Context, wg *sync.WaitGroup) {
	if ctx.Err() != nil {
		return
	}
	for _, l := range e.takeLost() {
		wg.Go(func() {
			if !guard.Do(e.log, func() { e.clear(ctx, l) }) {
				e.giveUpLost(l, l.strays)
			}
		})
	}
}

// giveUpLost gives a slot up after a panic. What is hidden stays so: it was not meant to be seen. The end of what runs beside it is kubelet's to see.
func (e *Engine) giveUpLost(l *lostSlot, strays []*stray) {
	for _, s := range strays {
		e.unmask(l, s)
	}
	if l.hold != nil {
		l.hold.Release()
	}
}

// clear takes care of a slot. If ctx ends, what is left stays as it is for the next process.
func (e *Engine) clear(ctx context.Context, l *lostSlot) {
	e.clearAll(ctx, l, l.strays)
	if l.waits != nil && !e.letPass(ctx, l) || ctx.Err() != nil {
		return
	}
	if len(l.left) > 0 {
		if l.hold == nil {
			return // what it has is hidden as long as this process lives
		}
		select {
		case <-l.hold.Yielded():
		case <-ctx.Done():
			return
		}
		e.log.WithFields(l.left[0].fields()).Warn("kubelet wants the place of a staged container that was left alone")
		e.clearAll(ctx, l, l.left)
		e.mu.Lock()
		delete(e.leftSlots, l.slot)
		e.mu.Unlock()
	}
	if l.hold != nil && ctx.Err() == nil {
		l.hold.Release()
	}
}

// givesWay is a driver that has nothing for kubelet.
type givesWay struct{}

func (givesWay) Stop(context.Context, int64) (bool, error) { return false, nil }
func (givesWay) Create(context.Context, *runtimeapi.CreateContainerRequest) (string, bool) {
	return "", false
}

// clearAll takes away what is in the list, until ctx ends.
func (e *Engine) clearAll(ctx context.Context, l *lostSlot, list []*stray) {
	for _, s := range list {
		for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			err := e.takeAway(ctx, l, s)
			if err == nil {
				break
			}
			if ctx.Err() == nil {
				e.log.WithFields(s.fields()).WithError(err).Warn("staged container that no operation knows not removed; trying again")
			}
			if crinode.Sleep(ctx, wait) != nil {
				return
			}
		}
	}
}

// takeAway stops and removes a stray and what belongs to it. It is shown instead if nothing else runs in its slot any more: it is what serves then.
func (e *Engine) takeAway(ctx context.Context, l *lostSlot, s *stray) error {
	st, info, err := e.node.Inspect(ctx, s.id)
	switch {
	case status.Code(err) == codes.NotFound:
		e.strayGone(s)
		return nil
	case err != nil:
		return err
	case st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING:
		alone, err := e.isAlone(ctx, l.slot, s)
		if err != nil {
			return err
		}
		if alone && (l.hold == nil || l.hold.YieldedTo() == nil) { // else kubelet makes the next one, or the pod goes
			e.log.WithFields(s.fields()).Warn("the old container has ended meanwhile: the one that no operation knows takes its place")
			s.reveal()
			if e.mayWait(ctx, s) {
				l.waits = s // its token is known since it was judged
			}
			return nil
		}
		e.unmask(l, s) // from here on the end of the old container is kubelet's to see
		grace := crinode.MinGrace
		if !e.node.Switchover.Waits(info.PID, s.id) {
			grace = graceOf(st.GetAnnotations(), maxLateGrace*time.Second)
		}
		if err := e.stopHeld(ctx, l.hold, s.id, grace); err != nil {
			return err
		}
	}
	files := e.node.Traces(s.labels[criclone.LabelPodName], s.labels[criclone.LabelPodNamespace], s.labels[criclone.LabelContainer], s.id)
	if !ran(st) || e.node.Switchover.Gate(s.token).Exists() {
		files = append(files, st.GetLogPath()) // of an application that ran it says what it did
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	if _, err := e.node.Runtime.RemoveContainer(call, &runtimeapi.RemoveContainerRequest{ContainerId: s.id}); err != nil {
		return err
	}
	e.node.RemoveTraces(files)
	e.strayGone(s)
	e.log.WithFields(s.fields()).Warn("removed a staged container that no operation knows")
	return nil
}

// reveal shows a stray, which is none any more.
func (s *stray) reveal() {
	s.claim.Reveal()
	s.runs = false // nothing beside it is masked
}

// unmask hides a stray alone, and no longer the end of the container beside it.
func (e *Engine) unmask(l *lostSlot, s *stray) {
	if !s.runs {
		return
	}
	s.runs = false
	before := s.claim
	s.claim = e.node.View.Stray(l.slot, s.sandbox, s.token, s.id, "")
	before.Discard()
}

// ran reports whether the runtime has started the container.
func ran(st *runtimeapi.ContainerStatus) bool { return st.GetStartedAt() != 0 }

// strayGone forgets a stray that does not exist any more.
func (e *Engine) strayGone(s *stray) {
	e.node.Records.Removed(s.id)
	e.node.View.Forget(s.id)
	s.claim.Discard()
	s.runs = false
	if err := e.node.Switchover.Gate(s.token).Remove(); err != nil {
		e.log.WithError(err).Warn("gate not removed")
	}
}

// abandon leaves what an operation has staged in the slot of claim, as rec has it, to the rules for lost ones. The operation itself does nothing with
// it any more. The slot is given up when that is done.
func (r *restart) abandon(ctx context.Context, claim *interceptors.Claim, rec containerRecord) {
	if rec.Token == "" || !rec.Hidden() {
		claim.Release()
		return
	}
	pod := r.o.Pod()
	s := &stray{id: rec.Successor, token: rec.Token, pod: podName(pod), sandbox: rec.Sandbox, labels: map[string]string{
		criclone.LabelPodName: pod.GetName(), criclone.LabelPodNamespace: pod.GetNamespace(), criclone.LabelPodUID: pod.GetUid(), criclone.LabelContainer: r.want.GetName(),
	}}
	s.runs = rec.Incumbent != "" // it may, and its incumbent may have ended
	s.claim = r.node.View.Stray(claim.Slot(), s.sandbox, s.token, s.id, rec.Incumbent)
	claim.Discard()
	l := &lostSlot{slot: claim.Slot(), hold: claim}
	over := guard.Do(r.log, func() {
		for crinode.Sleep(ctx, 0) == nil {
			err := r.e.findLost(ctx, l, s)
			if err == nil {
				r.e.clear(ctx, l)
				return
			}
			r.log.WithError(err).Warn("what the operation has left is not found; trying again")
			_ = crinode.Sleep(ctx, time.Second)
		}
	})
	if !over {
		r.e.giveUpLost(l, []*stray{s})
	}
}

// findLost decides of what an operation has left in the slot.
func (e *Engine) findLost(ctx context.Context, l *lostSlot, s *stray) error {
	list, err := e.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: s.sandbox}})
	if err != nil {
		return err
	}
	of := slices.DeleteFunc(list.GetContainers(), func(c *runtimeapi.Container) bool { return c.GetLabels()[criclone.LabelContainer] != l.slot.Container })
	slices.SortFunc(of, func(a, b *runtimeapi.Container) int { return cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()) })
	serves := e.serves(ctx, of)
	i := slices.IndexFunc(of, func(c *runtimeapi.Container) bool {
		return c.GetAnnotations()[interceptors.StagedAnnotation] == s.token
	})
	switch {
	case i < 0:
		e.strayGone(s)
	case e.isStray(of[i], s.token, serves):
		s.id = of[i].GetId()
		s.claim.Staged(s.id)
		l.strays = append(l.strays, s)
	default:
		s.id = of[i].GetId()
		s.claim.Staged(s.id)
		s.reveal()
		if of[i] == serves && e.mayWait(ctx, s) {
			l.waits = s
			e.keepToken(s.token)
		}
	}
	return nil
}

// isAlone reports whether nothing else of the slot runs.
func (e *Engine) isAlone(ctx context.Context, slot interceptors.Slot, s *stray) (bool, error) {
	list, err := e.node.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: s.sandbox}})
	if err != nil {
		return false, err
	}
	of := slices.DeleteFunc(list.GetContainers(), func(c *runtimeapi.Container) bool { return c.GetLabels()[criclone.LabelContainer] != slot.Container })
	slices.SortFunc(of, func(a, b *runtimeapi.Container) int { return cmp.Compare(a.GetCreatedAt(), b.GetCreatedAt()) })
	first := e.serves(ctx, of)
	return first.GetId() == s.id, nil
}

// stopHeld stops a container, within a shorter grace once kubelet waits for the slot.
func (e *Engine) stopHeld(ctx context.Context, hold *interceptors.Claim, id string, grace time.Duration) error {
	stop := func(ctx context.Context, grace time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, grace+crinode.CallTimeout)
		defer cancel()
		_, err := e.node.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: int64(grace / time.Second)})
		return err
	}
	if hold == nil {
		return stop(ctx, grace)
	}
	// The call is cut off when kubelet comes, or the daemon ends: it has asked the process to stop, and kills it no sooner.
	first, end := crinode.EndWith(ctx, hold.Yielded())
	err := stop(first, grace)
	end()
	y := hold.YieldedTo()
	if err == nil || ctx.Err() != nil || y == nil {
		return err
	}
	return stop(ctx, max(crinode.MinGrace, min(grace, time.Duration(y.Grace)*time.Second)))
}

// letPass lets a container pass that waits at its gate while nothing else of its slot runs. It returns false if ctx has ended before that.
func (e *Engine) letPass(ctx context.Context, l *lostSlot) (over bool) {
	s := l.waits
	log := e.log.WithFields(s.fields())
	g := e.node.Switchover.Gate(s.token)
	defer func() {
		if !over {
			return
		}
		if err := g.Remove(); err != nil {
			log.WithError(err).Warn("gate not removed")
		}
	}()
	if e.unwanted(ctx, s) {
		log.Warn("a container that no operation knows waits at its gate and is not what the pod's spec asks for: kubelet replaces it")
		return true
	}
	waiting, cancel := context.WithTimeout(ctx, e.node.Switchover.GateTimeout)
	defer cancel()
	if l.hold != nil {
		var end func()
		waiting, end = crinode.EndWith(waiting, l.hold.Yielded())
		defer end()
	}
	err := g.Await(waiting, func() error {
		st, info, err := e.node.Inspect(waiting, s.id)
		switch {
		case status.Code(err) == codes.NotFound, err == nil && st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return errPassed
		case err == nil && e.node.Switchover.OfContainer(info.PID, s.id) == nil && !gate.Waiting(info.PID):
			return errPassed
		}
		return nil // the runtime may be restarting
	})
	if err == nil {
		err = g.Open()
	}
	switch {
	case err == nil:
		log.Warn("a container that no operation knows was waiting at its gate, and the one before it has ended: it begins")
		e.node.SetStarted(s.id, time.Now())
		return true
	case ctx.Err() != nil:
		g.Leave() // for the next process
		return false
	case errors.Is(err, errPassed):
		return true
	}
	_, info, ierr := e.node.Inspect(ctx, s.id)
	waits := ierr == nil && e.node.Switchover.StillWaits(ctx, info.PID, s.id)
	switch {
	case ctx.Err() != nil:
		g.Leave() // for the next process
		return false
	case waits:
		// Nobody can let it pass: kubelet's policy is for one that has ended.
		log.WithError(err).Warn("a container that no operation knows cannot pass its gate, and is stopped")
		if err := e.stopHeld(ctx, nil, s.id, crinode.MinGrace); err != nil {
			log.WithError(err).Warn("container not stopped")
		}
	}
	return true
}

// errPassed says that nothing waits at a gate any more.
var errPassed = errors.New("it has passed its gate, or ended")

// unwanted reports whether kubelet says that the pod's spec has another image than the container was made for. One that waits does not begin
// then; kubelet finds it running with another hash than the spec's, and replaces it whatever the pod's restart policy is.
func (e *Engine) unwanted(ctx context.Context, s *stray) bool {
	if e.node.Pods == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, podsPatience)
	defer cancel()
	pod, err := e.node.Pods.Pod(ctx, s.labels[criclone.LabelPodUID])
	if err != nil || pod.Images[s.labels[criclone.LabelContainer]] == "" {
		return false
	}
	st, err := e.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: s.id})
	name := s.labels[criclone.LabelContainer]
	return err == nil && st.GetStatus().GetAnnotations()[criclone.AnnotationHash] != criclone.KubeletHash(name, pod.Images[name])
}

// graceOf is what kubelet gives a container to stop, at most the time given.
func graceOf(annotations map[string]string, most time.Duration) time.Duration {
	s, err := strconv.ParseInt(annotations[criclone.AnnotationTerminationGrace], 10, 32)
	if err != nil || s < 0 {
		return min(defaultGrace, most)
	}
	return max(crinode.MinGrace, min(time.Duration(s)*time.Second, most))
}
