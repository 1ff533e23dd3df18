// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/guard"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// Clear takes care of the slots in which Judge has found strays, each by itself. wg owns that.
func (k *Keeper) Clear(ctx context.Context, wg *sync.WaitGroup) {
	if ctx.Err() != nil {
		return
	}
	for _, l := range k.takeSlots() {
		wg.Go(func() {
			if !guard.Do(k.Log, func() { l.clear(ctx) }) {
				l.giveUp(l.strays)
			}
		})
	}
}

// Abandon leaves what an operation has staged in the slot of claim, as rec has it, to the rules for
// strays. The operation itself does nothing with it any more. Abandon gives the slot up when that
// is done.
func (k *Keeper) Abandon(
	ctx context.Context, log logrus.FieldLogger, claim *view.Claim, pod *opsv1.PodRef, rec store.Container,
) {
	if rec.Token == "" || !rec.Hidden() {
		claim.Release()
		return
	}
	s := &stray{
		id: rec.Successor, token: rec.Token, pod: pod.GetNamespace() + "/" + pod.GetName(), sandbox: rec.Sandbox,
		labels: map[string]string{
			criclone.LabelPodName: pod.GetName(), criclone.LabelPodNamespace: pod.GetNamespace(),
			criclone.LabelPodUID: pod.GetUid(), criclone.LabelContainer: claim.Slot().Container,
		},
		runs: rec.Incumbent != "", // it may, and its incumbent may have ended
	}
	s.claim = k.View.Stray(claim.Slot(), s.sandbox, s.token, s.id, rec.Incumbent)
	claim.Discard()
	l := &slot{k: k, at: claim.Slot(), hold: claim}
	over := guard.Do(log, func() {
		for crinode.Sleep(ctx, 0) == nil {
			err := l.find(ctx, s)
			if err == nil {
				l.clear(ctx)
				return
			}
			log.WithError(err).Warn("what the operation has left is not found; trying again")
			_ = crinode.Sleep(ctx, time.Second)
		}
	})
	if !over {
		l.giveUp([]*stray{s})
	}
}

// find decides of what an operation has left in the slot.
func (l *slot) find(ctx context.Context, s *stray) error {
	of, err := l.list(ctx, s.sandbox)
	if err != nil {
		return err
	}
	serves := l.k.serves(ctx, of)
	i := slices.IndexFunc(of, func(c *runtimeapi.Container) bool { return tokenOf(c) == s.token })
	switch {
	case i < 0:
		l.forget(s)
	case l.k.isStray(of[i], s.token, serves):
		s.id = of[i].GetId()
		s.claim.Staged(s.id)
		l.strays = append(l.strays, s)
	default:
		s.id = of[i].GetId()
		s.claim.Staged(s.id)
		s.reveal()
		if of[i] == serves && l.k.mayWait(ctx, s) {
			l.waits = s
			l.k.Tokens.Add(s.token)
		}
	}
	return nil
}

// giveUp gives the slot up after a panic. What is hidden stays so: it was not meant to be seen. The
// end of what runs beside it is kubelet's to see.
func (l *slot) giveUp(strays []*stray) {
	for _, s := range strays {
		l.unmask(s)
	}
	if l.hold != nil {
		l.hold.Release()
	}
}

// clear takes care of the slot. If ctx ends, what is left stays as it is for the next process.
func (l *slot) clear(ctx context.Context) {
	l.clearAll(ctx, l.strays)
	if l.waits != nil && !l.letPass(ctx) || ctx.Err() != nil {
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
		l.k.Log.WithFields(l.left[0].fields()).Warn("kubelet wants the place of a staged container that was left alone")
		l.clearAll(ctx, l.left)
		l.k.mu.Lock()
		delete(l.k.left, l.at)
		l.k.mu.Unlock()
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
func (l *slot) clearAll(ctx context.Context, list []*stray) {
	for _, s := range list {
		for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			err := l.takeAway(ctx, s)
			if err == nil {
				break
			}
			if ctx.Err() == nil {
				l.k.Log.WithFields(s.fields()).WithError(err).
					Warn("staged container that no operation knows not removed; trying again")
			}
			if crinode.Sleep(ctx, wait) != nil {
				return
			}
		}
	}
}

// takeAway stops and removes a stray and what belongs to it. If nothing else runs in its slot any
// more, takeAway shows the stray instead: it is what serves then.
func (l *slot) takeAway(ctx context.Context, s *stray) error {
	st, info, err := l.k.Node.Inspect(ctx, s.id)
	switch {
	case status.Code(err) == codes.NotFound:
		l.forget(s)
		return nil
	case err != nil:
		return err
	case st.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING:
		alone, err := l.isAlone(ctx, s)
		if err != nil {
			return err
		}
		if alone && (l.hold == nil || l.hold.YieldedTo() == nil) { // else kubelet makes the next one, or the pod goes
			l.k.Log.WithFields(s.fields()).
				Warn("the old container has ended meanwhile: the one that no operation knows takes its place")
			s.reveal()
			if l.k.mayWait(ctx, s) {
				l.waits = s // its token is known since it was judged
			}
			return nil
		}
		l.unmask(s) // from here on the end of the old container is kubelet's to see
		grace := crinode.MinGrace
		if !l.k.Switchover.Waits(info.PID, s.id) {
			grace = graceOf(st.GetAnnotations())
		}
		if err := l.stop(ctx, s.id, grace); err != nil {
			return err
		}
	}
	return l.remove(ctx, s, st)
}

// remove removes a stray that does not run, and its traces.
func (l *slot) remove(ctx context.Context, s *stray, st *runtimeapi.ContainerStatus) error {
	files := []string{filepath.Join(l.k.LogLinks, criclone.LogLinkName(s.labels[criclone.LabelPodName],
		s.labels[criclone.LabelPodNamespace], s.labels[criclone.LabelContainer], s.id))}
	if ran := st.GetStartedAt() != 0; !ran || l.k.Switchover.Gate(s.token).Exists() {
		files = append(files, st.GetLogPath()) // the log of an application that ran says what it did
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), crinode.CallTimeout)
	defer cancel()
	_, err := l.k.Node.Runtime.RemoveContainer(call, &runtimeapi.RemoveContainerRequest{ContainerId: s.id})
	if err != nil {
		return err
	}
	l.k.Node.RemoveTraces(files)
	l.forget(s)
	l.k.Log.WithFields(s.fields()).Warn("removed a staged container that no operation knows")
	return nil
}

// unmask hides a stray alone, and no longer the end of the container beside it.
func (l *slot) unmask(s *stray) {
	if !s.runs {
		return
	}
	s.runs = false
	before := s.claim
	s.claim = l.k.View.Stray(l.at, s.sandbox, s.token, s.id, "")
	before.Discard()
}

// forget forgets a stray that does not exist any more.
func (l *slot) forget(s *stray) {
	l.k.Records.Removed(s.id)
	l.k.View.Forget(s.id)
	s.claim.Discard()
	s.runs = false
	if err := l.k.Switchover.Gate(s.token).Remove(); err != nil {
		l.k.Log.WithError(err).Warn("gate not removed")
	}
}

// isAlone reports whether nothing else of the slot runs.
func (l *slot) isAlone(ctx context.Context, s *stray) (bool, error) {
	of, err := l.list(ctx, s.sandbox)
	if err != nil {
		return false, err
	}
	return l.k.serves(ctx, of).GetId() == s.id, nil
}

// stop stops a container, within a shorter grace once kubelet waits for the slot.
func (l *slot) stop(ctx context.Context, id string, grace time.Duration) error {
	if l.hold == nil {
		return l.stopWithin(ctx, id, grace)
	}
	// The call is cut off when kubelet comes, or the daemon ends: it has asked the process to stop,
	// and kills it no sooner.
	first, end := crinode.EndWith(ctx, l.hold.Yielded())
	err := l.stopWithin(first, id, grace)
	end()
	y := l.hold.YieldedTo()
	if err == nil || ctx.Err() != nil || y == nil {
		return err
	}
	return l.stopWithin(ctx, id, max(crinode.MinGrace, min(grace, time.Duration(y.Grace)*time.Second)))
}

// stopWithin stops a container within the grace, in one call that ctx can cut off.
func (l *slot) stopWithin(ctx context.Context, id string, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, grace+crinode.CallTimeout)
	defer cancel()
	_, err := l.k.Node.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{
		ContainerId: id, Timeout: int64(grace / time.Second),
	})
	return err
}

// graceOf is what kubelet gives a container to stop, at most [crinode.MaxLateGrace].
func graceOf(annotations map[string]string) time.Duration {
	s, err := strconv.ParseInt(annotations[criclone.AnnotationTerminationGrace], 10, 32)
	if err != nil || s < 0 {
		return min(crinode.DefaultGrace, crinode.MaxLateGrace)
	}
	return max(crinode.MinGrace, min(time.Duration(s)*time.Second, crinode.MaxLateGrace))
}
