// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Operation is the state of an operation on a node: an [opsv1.Operation] or an
// [opsv1.PullOperation]. An operation with a finish time does not change any more.
type Operation interface {
	proto.Message
	GetUid() string
	GetFinishTime() *timestamppb.Timestamp
}

// Watch calls each with an operation as it is and after changes, from one goroutine. It returns nil
// once each has returned false, and when the node ends the stream.
type Watch[O Operation] func(ctx context.Context, n Node, uid string, each func(O) bool) error

// Key names an operation that an object follows. UIDs alone do not do: those of pulls are the same
// on all nodes of a job.
type Key struct {
	For       reconcile.Request
	Node, UID string
}

// Next says what follows on a message about an operation.
type Next int

const (
	// GoOn listens to the stream for more.
	GoOn Next = iota
	// Again ends the stream, and begins again after a pause.
	Again
	// Stop ends all interest in the operation, though it has not finished.
	Stop
)

// Follow says how to follow one operation. The tracker calls the functions from one goroutine, the
// operation's own, without locks held: they may call the tracker, and take locks under which others
// call it. ctx is done once the operation has been forgotten: who forgets under a lock, and reads
// ctx.Err under the same lock in a function, never takes a message for one that still matters.
type Follow[O Operation] struct {
	Node Node
	UID  string
	// For is the object to reconcile when there are news.
	For reconcile.Request
	// Begin starts the operation, or finds it if it was started before. The tracker calls Begin
	// before each stream. Nil: there is only the stream.
	Begin func(ctx context.Context) (O, error)
	// Each takes in a message, from Begin or from the stream. before is what the node said before;
	// nil if nothing. Each says whether to wake the object. Nil: always.
	Each func(ctx context.Context, before, after O) (wake bool)
	// Until says, after Each, what follows on a message. With a positive again, the tracker ends
	// the stream that long after the message and begins again without a pause. Nil: GoOn.
	Until func(after O) (next Next, again time.Duration)
	// GiveUp says whether an error of Begin or of the stream ends all. silent is how long errors
	// have come without news between them, taken that Begin has succeeded before. Nil: always.
	GiveUp func(err error, silent time.Duration, taken bool) bool
	// End is called when the operation has finished, when GiveUp ended all, and after Stop; not
	// when the operation was forgotten. It may wait for the node. It says whether to wake the
	// object. Nil: always.
	End func(ctx context.Context, s State[O]) (wake bool)
	// First bounds the wait for the first message of a stream. A stream that brings none counts as
	// an error. 0: Renew bounds the wait, and there is no error.
	First time.Duration
	// Renew is how long a stream may be without news before the tracker begins again, which notices
	// a node that vanished without a word. 0: for ever.
	Renew time.Duration
	// Retry is the pause before the tracker begins again, after so many tries without news. Nil:
	// the follow ends with its first stream.
	Retry func(tries int) time.Duration
	// StreamNews says that only messages of the stream are news. Otherwise what Begin returns is,
	// too.
	StreamNews bool
}

// Key returns the key of the operation.
func (f *Follow[O]) Key() Key { return Key{For: f.For, Node: f.Node.Name, UID: f.UID} }

// State is what is known of an operation.
type State[O Operation] struct {
	// Op is the last that the node said, at Heard; nil if nothing.
	Op    O
	Heard time.Time
	// Taken says that Begin has succeeded.
	Taken bool
	// Watched says that the tracker goes on following the operation.
	Watched bool
	// Over says that the follow has come to its end. Op has finished, or Err is why not, or neither
	// after Stop. Ensure does not begin again what is over; Forget or Note come first.
	Over bool
	// Err is the last error since there were news, and Since is when the first of them came.
	Err   error
	Since time.Time
	// Ended is closed when the goroutine of the operation has ended; nil if there is none.
	Ended <-chan struct{}
}

// Finished says that the operation has finished.
func (s *State[O]) Finished() bool { return s.Op.GetFinishTime() != nil }

// TrackerOptions may all be left out.
type TrackerOptions struct {
	// Limit bounds the operations that are followed at once. 0: there is no bound.
	Limit int
	// Gather is how long to collect news of an object before waking it. Nil: wake at once.
	Gather func(reconcile.Request) time.Duration
	// Following counts operations that are followed, by +1 and -1.
	Following func(n int)
	Log       logrus.FieldLogger
}

// Tracker follows operations on nodes: one goroutine per operation begins it if need be, listens
// to the node's stream, remembers the last message, and wakes the reconciler of the object that the
// operation is for. No method waits for a node or for a goroutine, and all are safe for concurrent
// use. A method never calls a function of a Follow itself.
//
// A tracker works once it has been added to the manager, which calls [Tracker.Start], and
// [Tracker.Source] has been added to the controller. Until then it only notes what to do.
//
// A reconciler that begins operations by unary calls of its own gives what they return to Note, and
// ensures a Follow without Begin. Others ensure, at each reconcile, a Follow with Begin, and go by
// the State. Whoever loses interest forgets. See the package's tests for both.
type Tracker[O Operation] struct {
	watch   Watch[O]
	method  string // for errors
	options TrackerOptions

	mu      sync.Mutex
	started bool
	stopped bool
	ops     map[Key]*tracked[O]
	active  int
	queue   workqueue.TypedRateLimitingInterface[reconcile.Request]
	early   map[reconcile.Request]bool // to wake once there is a queue
	running sync.WaitGroup
}

// tracked is one operation. It is replaced when its follow begins anew, so that what an earlier
// goroutine says does not count. The tracker's mutex guards state.
type tracked[O Operation] struct {
	follow *Follow[O] // nil if there is no goroutine, and none to come
	ctx    context.Context
	cancel context.CancelFunc
	// ended is closed at the end of the goroutine, which was launched.
	ended    chan struct{}
	launched bool
	counted  bool // for the limit
	state    State[O]
}

// NewTracker returns a tracker of operations on containers.
func NewTracker(client interface {
	WatchOperation(ctx context.Context, n Node, uid string, each func(*opsv1.Operation)) error
}, o TrackerOptions) *Tracker[*opsv1.Operation] {
	watch := func(ctx context.Context, n Node, uid string, each func(*opsv1.Operation) bool) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		enough := false
		err := client.WatchOperation(ctx, n, uid, func(op *opsv1.Operation) {
			if !enough && !each(op) {
				enough = true
				cancel()
			}
		})
		if enough {
			return nil
		}
		return err
	}
	return newTracker(watch, "WatchOperation", o)
}

// NewPullTracker returns a tracker of pulls.
func NewPullTracker(client interface {
	WatchPull(ctx context.Context, n Node, uid string, each func(*opsv1.PullOperation) bool) error
}, o TrackerOptions) *Tracker[*opsv1.PullOperation] {
	return newTracker(client.WatchPull, "WatchPull", o)
}

func newTracker[O Operation](watch Watch[O], method string, o TrackerOptions) *Tracker[O] {
	if o.Following == nil {
		o.Following = func(int) {}
	}
	return &Tracker[O]{watch: watch, method: method, options: o,
		ops: map[Key]*tracked[O]{}, early: map[reconcile.Request]bool{}}
}

// Start implements manager.Runnable: it follows operations until ctx is done and all goroutines
// have ended. It returns nil.
func (t *Tracker[O]) Start(ctx context.Context) error {
	t.mu.Lock()
	t.started = true
	for _, e := range t.ops {
		if e.state.Watched {
			t.launch(e)
		}
	}
	t.mu.Unlock()
	<-ctx.Done()
	t.mu.Lock()
	t.stopped = true
	for _, e := range t.ops {
		t.drop(e)
	}
	t.mu.Unlock()
	t.running.Wait()
	return nil
}

// Source returns the source by which the tracker wakes a controller.
func (t *Tracker[O]) Source() source.Source {
	return source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
		t.mu.Lock()
		early := t.early
		t.queue, t.early = q, nil
		t.mu.Unlock()
		for request := range early {
			t.Wake(request)
		}
		return nil
	})
}

// Wake has an object reconciled, once its news have been gathered.
func (t *Tracker[O]) Wake(request reconcile.Request) {
	t.mu.Lock()
	q := t.queue
	if q == nil {
		t.early[request] = true
	}
	t.mu.Unlock()
	if q == nil {
		return
	}
	var after time.Duration
	if t.options.Gather != nil {
		after = t.options.Gather(request)
	}
	q.AddAfter(request, after) // at once if after is 0
}

// Ensure has the operation followed from now on, unless it is already, or is over, and returns what
// is known. At the limit it begins nothing; then State says neither Watched nor Over. The functions
// of the first Follow count until the operation is forgotten, unless the node has another address
// now: then the follow begins anew, with the functions of f.
func (t *Tracker[O]) Ensure(f Follow[O]) State[O] {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.ops[f.Key()]
	if e != nil && (e.state.Over || e.state.Watched && e.follow.Node == f.Node) {
		return e.state
	}
	if t.stopped || t.options.Limit > 0 && t.active >= t.options.Limit {
		if e == nil {
			return State[O]{}
		}
		return e.state
	}
	e = t.renew(f.Key())
	e.follow, e.ended = &f, make(chan struct{})
	e.state.Watched, e.state.Ended = true, e.ended
	t.active++
	e.counted = true
	if t.started {
		t.launch(e)
	}
	return e.state
}

// Get returns what is known of an operation, and whether anything is.
func (t *Tracker[O]) Get(key Key) (State[O], bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.ops[key]; e != nil {
		return e.state, true
	}
	return State[O]{}, false
}

// Note takes in what a unary call has said of an operation. It wakes nobody, and calls neither Each
// nor End. A follow that has given up may be ensured again after it.
func (t *Tracker[O]) Note(request reconcile.Request, n Node, op O) {
	key := Key{For: request, Node: n.Name, UID: op.GetUid()}
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.ops[key]
	if e == nil {
		e = t.renew(key)
	}
	e.state.hear(op)
	if !e.state.Watched {
		e.state.Over, e.state.Err, e.state.Since = e.state.Finished(), nil, time.Time{}
	}
}

// Forget ends the follow of operations, and forgets what is known of them. It wakes nobody, and
// does not wait: see State.Ended for when the goroutine has ended, and Follow for its functions.
// Keys that nobody follows are no error.
func (t *Tracker[O]) Forget(keys ...Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, key := range keys {
		if e := t.ops[key]; e != nil {
			t.drop(e)
			delete(t.ops, key)
		}
	}
}

// ForgetAll forgets all operations. It suits [kruise.Gate.OnClose].
func (t *Tracker[O]) ForgetAll() {
	t.Forget(t.keys()...)
}

func (t *Tracker[O]) keys() []Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.ops))
}

// Size returns how many operations are known, and how many goroutines follow one.
func (t *Tracker[O]) Size() (known, followed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.ops), t.active
}

// renew puts a new entry in the place of the one there is, with what the node has said. The caller
// holds the mutex.
func (t *Tracker[O]) renew(key Key) *tracked[O] {
	e := &tracked[O]{}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	if old := t.ops[key]; old != nil {
		t.drop(old)
		e.state.Op, e.state.Heard, e.state.Taken = old.state.Op, old.state.Heard, old.state.Taken
	}
	t.ops[key] = e
	return e
}

// drop ends the follow of an entry. The caller holds the mutex.
func (t *Tracker[O]) drop(e *tracked[O]) {
	e.cancel()
	if e.counted && !e.launched {
		t.discount(e)
		close(e.ended)
	}
}

// discount takes an entry off those that count for the limit. The caller holds the mutex.
func (t *Tracker[O]) discount(e *tracked[O]) {
	e.state.Watched = false
	if e.counted {
		e.counted = false
		t.active--
	}
}
