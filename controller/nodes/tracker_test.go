// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

type (
	pullTracker = nodes.Tracker[*opsv1.PullOperation]
	pullFollow  = nodes.Follow[*opsv1.PullOperation]
	pullState   = nodes.State[*opsv1.PullOperation]
)

// pulls is a node on which the test says what each stream brings.
type pulls struct {
	streams chan chan *opsv1.PullOperation // a stream that was opened; it ends when the test closes it
	err     error                          // of the streams that the test closes
}

func (p *pulls) WatchPull(ctx context.Context, _ nodes.Node, _ string, each func(*opsv1.PullOperation) bool) error {
	stream := make(chan *opsv1.PullOperation)
	select {
	case p.streams <- stream:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		select {
		case op, more := <-stream:
			if !more {
				return p.err
			}
			if !each(op) {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var (
	job    = reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "job"}}
	here   = nodes.Node{Name: "node-1", Address: "192.0.2.1:1"}
	silent = &nodes.Error{Node: here, Err: status.Error(codes.Unavailable, "away"), Silent: true}
)

func at(phase opsv1.PullPhase) *opsv1.PullOperation {
	return &opsv1.PullOperation{Uid: "u", Phase: phase}
}

func done() *opsv1.PullOperation {
	return &opsv1.PullOperation{Uid: "u", Phase: opsv1.PullPhase_PULL_SUCCEEDED, FinishTime: timestamppb.Now()}
}

// trackerBed is a tracker with a controller's queue.
type trackerBed struct {
	*pullTracker
	t     *testing.T
	node  *pulls
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
	// follow is what most tests ensure.
	follow pullFollow
	key    nodes.Key
}

// track runs a test in a bubble, with a tracker that has been started.
func track(t *testing.T, o nodes.TrackerOptions, test func(*trackerBed)) {
	unstarted(t, o, func(b *trackerBed) {
		b.start(b.t.Context())
		test(b)
	})
}

func unstarted(t *testing.T, o nodes.TrackerOptions, test func(*trackerBed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		node := &pulls{streams: make(chan chan *opsv1.PullOperation)}
		b := &trackerBed{pullTracker: nodes.NewPullTracker(node, o), t: t, node: node,
			follow: pullFollow{Node: here, UID: "u", For: job,
				Begin: func(context.Context) (*opsv1.PullOperation, error) {
					return at(opsv1.PullPhase_PULL_RESOLVING),
						nil
				},
				Retry: func(tries int) time.Duration { return time.Second << tries }}}
		b.key = b.follow.Key()
		b.queue = workqueue.NewTypedRateLimitingQueue(
			workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
		defer b.queue.ShutDown()
		test(b)
	})
}

func (b *trackerBed) start(ctx context.Context) {
	b.t.Helper()
	if err := b.Source().Start(ctx, b.queue); err != nil {
		b.t.Fatal(err)
	}
	go func() { _ = b.Start(ctx) }()
}

// woken says that the object has been woken since the last call.
func (b *trackerBed) woken() bool {
	synctest.Wait()
	if b.queue.Len() == 0 {
		return false
	}
	request, _ := b.queue.Get()
	b.queue.Done(request)
	return request == job
}

// stream is the stream that has been opened.
func (b *trackerBed) stream() chan *opsv1.PullOperation {
	b.t.Helper()
	synctest.Wait()
	select {
	case stream := <-b.node.streams:
		return stream
	default:
		b.t.Fatal("no stream was opened")
		return nil
	}
}

func (b *trackerBed) noStream() {
	b.t.Helper()
	synctest.Wait()
	select {
	case <-b.node.streams:
		b.t.Fatal("a stream was opened")
	default:
	}
}

func (b *trackerBed) state() pullState {
	synctest.Wait()
	s, _ := b.Get(b.key)
	return s
}

func (b *trackerBed) wantSize(known, followed int) {
	b.t.Helper()
	synctest.Wait()
	if k, f := b.Size(); k != known || f != followed {
		b.t.Errorf("%d operations known, %d followed; want %d, %d", k, f, known, followed)
	}
}

// A reconciler ensures an operation at each reconcile, and goes by its state.
func TestTracker(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		if s := b.Ensure(b.follow); !s.Watched || s.Over || s.Op != nil {
			t.Errorf("at first: %+v", s)
		}
		stream := b.stream()
		if s := b.Ensure(b.follow); s.Op.GetPhase() != opsv1.PullPhase_PULL_RESOLVING || !s.Taken || !b.woken() {
			t.Errorf("begun: %+v", s)
		}
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		if s := b.state(); s.Op.GetPhase() != opsv1.PullPhase_PULL_FETCHING || !s.Heard.Equal(time.Now()) ||
			!b.woken() {
			t.Errorf("under way: %+v", s)
		}
		stream <- done()
		s := b.state()
		if !s.Over || !s.Finished() || s.Watched || !b.woken() {
			t.Errorf("at the end: %+v", s)
		}
		<-s.Ended
		if s := b.Ensure(b.follow); !s.Over {
			t.Errorf("after the end: %+v", s)
		}
		b.noStream()
		b.wantSize(1, 0)
		b.Forget(b.key)
		b.wantSize(0, 0)
	})
}

// Before Start and without a queue nothing hangs, and nothing is lost.
func TestTrackerUnstarted(t *testing.T) {
	unstarted(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		other := b.follow
		other.UID = "other"
		forgotten := b.Ensure(other)
		b.Ensure(b.follow)
		b.Wake(job)
		b.Forget(other.Key())
		<-forgotten.Ended
		b.noStream()
		b.start(b.t.Context())
		b.stream()
		if !b.woken() {
			t.Error("nobody was woken")
		}
		b.wantSize(1, 1)
	})
	unstarted(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		ctx, cancel := context.WithCancel(b.t.Context())
		cancel()
		b.Ensure(b.follow)
		b.start(ctx)
		b.noStream()
		if s := b.Ensure(b.follow); s.Watched {
			t.Error("a follow began after the end")
		}
		b.Note(job, here, at(opsv1.PullPhase_PULL_FETCHING))
		b.ForgetAll()
		b.wantSize(0, 0)
	})
}

// The end of Start ends all streams, and waits for them.
func TestTrackerStop(t *testing.T) {
	unstarted(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		ctx, cancel := context.WithCancel(b.t.Context())
		ended := make(chan struct{})
		go func() {
			_ = b.Start(ctx)
			close(ended)
		}()
		b.follow.End = func(context.Context, pullState) bool {
			t.Error("the operation has not ended")
			return false
		}
		s := b.Ensure(b.follow)
		b.stream()
		cancel()
		<-ended
		<-s.Ended
	})
}

// What is forgotten says nothing more, in a function of the follow, too, and nobody is woken.
func TestTrackerForget(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		said := 0
		b.follow.Each = func(ctx context.Context, _, after *opsv1.PullOperation) bool {
			said++
			if after.GetPhase() == opsv1.PullPhase_PULL_FETCHING {
				b.Forget(b.key)
				if ctx.Err() == nil {
					t.Error("the context of a forgotten operation is not done")
				}
			}
			return after.GetPhase() == opsv1.PullPhase_PULL_FETCHING
		}
		s := b.Ensure(b.follow)
		stream := b.stream()
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		<-s.Ended
		if b.woken() || said != 2 {
			t.Errorf("%d messages were told, or somebody was woken", said)
		}
		b.wantSize(0, 0)
		b.Ensure(b.follow)
		b.stream()
		b.ForgetAll()
		b.wantSize(0, 0)
	})
}

// Errors are tried again with pauses, until GiveUp says so.
func TestTrackerRetry(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		fail, begun := error(nil), 0
		b.follow.Begin = func(context.Context) (*opsv1.PullOperation, error) {
			begun++
			return at(opsv1.PullPhase_PULL_RESOLVING), fail
		}
		var gaps []time.Duration
		b.follow.GiveUp = func(err error, silent time.Duration, taken bool) bool {
			if !taken || !errors.Is(err, fail) {
				t.Errorf("%v, taken: %v", err, taken)
			}
			gaps = append(gaps, silent)
			return silent >= 7*time.Second
		}
		var end pullState
		b.follow.End = func(_ context.Context, s pullState) bool {
			end = s
			return true
		}
		began := time.Now()
		b.Ensure(b.follow)
		stream := b.stream()
		b.woken()
		fail, b.node.err = silent, silent
		close(stream)
		if s := b.state(); !errors.Is(s.Err, silent) || !s.Since.Equal(began) || !s.Watched || s.Over || b.woken() {
			t.Errorf("away: %+v", s)
		}
		time.Sleep(8 * time.Second)
		s := b.state()
		if !s.Over || s.Watched || !errors.Is(s.Err, silent) || !b.woken() || begun != 4 {
			t.Errorf("begun %d times, given up: %+v", begun, s)
		}
		if !errors.Is(end.Err, s.Err) || !end.Over || end.Watched {
			t.Errorf("told at the end: %+v", end)
		}
		if want := []time.Duration{0, time.Second, 3 * time.Second, 7 * time.Second}; !slices.Equal(gaps, want) {
			t.Errorf("silent for %v, want %v", gaps, want)
		}
		b.Ensure(b.follow)
		b.noStream()
		b.Note(job, here, at(opsv1.PullPhase_PULL_FETCHING)) // it is back
		fail = nil
		if s := b.Ensure(b.follow); !s.Watched || s.Over || s.Err != nil || !s.Since.IsZero() {
			t.Errorf("after news: %+v", s)
		}
		b.stream()
	})
}

// News end a silence. With StreamNews only those of the stream do.
func TestTrackerNews(t *testing.T) {
	for _, streamNews := range []bool{false, true} {
		track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
			b.node.err = silent
			b.follow.StreamNews = streamNews
			b.follow.GiveUp = func(_ error, silent time.Duration, _ bool) bool { return silent >= 3*time.Second }
			b.Ensure(b.follow)
			for range 3 {
				close(b.stream())
				time.Sleep(2 * time.Second)
			}
			if s := b.state(); s.Over != streamNews {
				t.Errorf("StreamNews %v: %+v", streamNews, s)
			}
		})
	}
}

// A stream without news begins again, at once when Until says when.
func TestTrackerRenew(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		b.follow.First, b.follow.Renew = 5*time.Second, 20*time.Second
		b.follow.GiveUp = func(err error, _ time.Duration, _ bool) bool {
			if nodes.Code(err) != codes.DeadlineExceeded {
				t.Error(err)
			}
			return false
		}
		var again time.Duration
		b.follow.Until = func(*opsv1.PullOperation) (nodes.Next, time.Duration) { return nodes.GoOn, again }
		wait := func(d time.Duration) {
			t.Helper()
			time.Sleep(d - time.Nanosecond)
			b.noStream()
			time.Sleep(time.Nanosecond)
		}
		b.Ensure(b.follow)
		b.stream()
		wait(6 * time.Second) // no answer, and a pause
		stream := b.stream()
		if s := b.state(); s.Err != nil { // Begin was answered
			t.Errorf("%+v", s)
		}
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		wait(21 * time.Second)
		stream = b.stream()
		again = 10 * time.Second
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		wait(10 * time.Second)
		b.stream()
	})
}

// Until ends a stream, or all.
func TestTrackerUntil(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		next := nodes.Again
		b.follow.Until = func(*opsv1.PullOperation) (nodes.Next, time.Duration) { return next, 0 }
		b.Ensure(b.follow)
		b.stream() <- at(opsv1.PullPhase_PULL_RESOLVING)
		b.noStream()
		time.Sleep(time.Second)
		stream := b.stream()
		next = nodes.Stop
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		if s := b.state(); !s.Over || s.Watched || s.Err != nil || s.Finished() || !b.woken() {
			t.Errorf("%+v", s)
		}
	})
}

// A node that has another address is followed there.
func TestTrackerMoved(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		before := b.Ensure(b.follow)
		b.stream()
		b.follow.Node.Address = "192.0.2.2:1"
		if s := b.Ensure(b.follow); s.Op == nil || !s.Watched {
			t.Errorf("%+v", s)
		}
		b.stream()
		<-before.Ended
		b.wantSize(1, 1)
	})
}

// At the limit nothing begins before another operation has ended. Pulls of the same UID on other
// nodes, and for other objects, are operations of their own.
func TestTrackerLimit(t *testing.T) {
	var following int
	track(t, nodes.TrackerOptions{Limit: 2, Following: func(n int) { following += n }}, func(b *trackerBed) {
		elsewhere, another := b.follow, b.follow
		elsewhere.Node.Name = "node-2"
		another.For.Name = "another"
		b.Ensure(b.follow)
		stream := b.stream()
		b.Ensure(elsewhere)
		b.stream()
		if s := b.Ensure(another); s.Watched || s.Over {
			t.Errorf("beyond the limit: %+v", s)
		}
		b.noStream()
		b.wantSize(2, 2)
		if following != 2 {
			t.Errorf("%d are counted", following)
		}
		stream <- done()
		b.wantSize(2, 1)
		b.Ensure(another)
		b.stream()
	})
}

// A reconciler that commands by itself notes what it is told. Its operation is followed by one
// stream at a time.
func TestTrackerNote(t *testing.T) {
	track(t, nodes.TrackerOptions{}, func(b *trackerBed) {
		b.follow.Begin, b.follow.Retry = nil, nil
		b.Note(job, here, at(opsv1.PullPhase_PULL_RESOLVING))
		if s, known := b.Get(b.key); !known || s.Watched || s.Over || s.Op == nil || b.woken() {
			t.Errorf("noted: %+v", s)
		}
		b.Ensure(b.follow)
		b.node.err = silent
		close(b.stream())
		if s := b.state(); s.Watched || !errors.Is(s.Err, silent) || !b.woken() {
			t.Errorf("broken: %+v", s)
		}
		b.noStream()
		b.Note(job, here, done())
		b.Note(job, here, at(opsv1.PullPhase_PULL_RESOLVING)) // too late
		if s := b.Ensure(b.follow); !s.Over || !s.Finished() || s.Err != nil {
			t.Errorf("noted the end: %+v", s)
		}
		b.noStream()
	})
}

// News are gathered.
func TestTrackerGather(t *testing.T) {
	gather := func(reconcile.Request) time.Duration { return time.Second }
	track(t, nodes.TrackerOptions{Gather: gather}, func(b *trackerBed) {
		b.Ensure(b.follow)
		stream := b.stream()
		stream <- at(opsv1.PullPhase_PULL_FETCHING)
		if b.woken() {
			t.Error("woken at once")
		}
		time.Sleep(time.Second)
		if !b.woken() || b.woken() {
			t.Error("not woken once")
		}
	})
}
