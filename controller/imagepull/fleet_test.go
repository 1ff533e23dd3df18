// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const imageBytes = 100 << 20

// forPeople is a message of which no program reads a part.
const forPeople = "a message for people"

// fleet is a set of nodes that implement the Images service, in this process. It outlives
// controllers.
type fleet struct {
	mu    sync.Mutex
	nodes map[string]*simNode
	// inFlight counts unfinished pulls by job UID, peak is the most there were.
	inFlight, peak map[string]int
	calls          map[string]int
	ctx            context.Context
	stop           context.CancelFunc
	wg             sync.WaitGroup
}

// simNode is one node. The fields say how it behaves.
type simNode struct {
	takes   time.Duration
	steps   int
	outcome string        // "" or the reason of a failure
	stuck   bool          // its pulls never end by themselves
	silent  bool          // it does not answer
	refused bool          // nothing listens
	busy    int           // so many commands are refused
	loses   int           // so many answers to commands to pull are lost
	lacks   bool          // its pulls wait for credentials to be given again
	full    string        // "" or why it pins nothing
	fast    string        // "" or why it keeps no speed limit
	old     bool          // it is of the version before, and says in messages what others say in fields
	user    string        // "" or whose credentials its registry wants
	comes   time.Time     // when the image does; zero: it is there
	ahead   time.Duration // of its clock
	endless string        // "" or the phase in which its pulls stay for ever: Fetching or InQueue
	// slow is how long a command takes, slowPull how much longer that to pull takes, even if its
	// caller does not wait.
	slow, slowPull time.Duration

	pulls    map[string]*simPull
	order    []string
	requests []*opsv1.PullRequest // those that began a pull
	pins     map[simPin]bool
}

type simPin struct{ owner, image string }

type simPull struct {
	req     *opsv1.PullRequest
	op      *opsv1.PullOperation
	changed chan struct{}
	cancel  context.CancelFunc
	reason  string // of the cancellation
	given   []*opsv1.RegistryCredential
}

func newFleet() *fleet {
	f := &fleet{nodes: map[string]*simNode{}, inFlight: map[string]int{}, peak: map[string]int{},
		calls: map[string]int{}}
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f
}

func (f *fleet) end() {
	f.stop()
	f.wg.Wait()
}

func (f *fleet) add(name string, n *simNode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n.steps == 0 {
		n.steps = 4
	}
	n.pulls, n.pins = map[string]*simPull{}, map[simPin]bool{}
	f.nodes[name] = n
}

// change changes how a node behaves.
func (f *fleet) change(name string, how func(*simNode)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	how(f.nodes[name])
}

func (f *fleet) node(ctx context.Context, n nodes.Node, method string) (*simNode, error) {
	f.mu.Lock()
	node := f.nodes[n.Name]
	f.calls[method]++
	silent, refused := node == nil || node.silent, node != nil && node.refused
	f.mu.Unlock()
	fail := func(code codes.Code, message string) error {
		return &nodes.Error{Node: n, Method: method, Err: status.Error(code, message), Silent: true}
	}
	if refused {
		return nil, fail(codes.Unavailable, "dial tcp "+n.Address+": connect: connection refused")
	}
	if silent {
		timeout := 5 * time.Second
		if method == "WatchPull" {
			timeout = 24 * time.Hour
		}
		sleep(ctx, timeout)
		return nil, fail(codes.DeadlineExceeded, "context deadline exceeded")
	}
	return node, ctx.Err()
}

func (f *fleet) loses(node *simNode) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if node.loses == 0 {
		return false
	}
	node.loses--
	return true
}

// delay is how long a command takes.
func (f *fleet) delay(node *simNode, pull bool) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if pull {
		return node.slow + node.slowPull
	}
	return node.slow
}

// late carries a command out after a while. Its caller may leave before that.
func late[T any](
	ctx context.Context, f *fleet, n nodes.Node, slow time.Duration, do func() (T, error),
) (T, error) {
	if slow == 0 {
		return do()
	}
	type outcome struct {
		value T
		err   error
	}
	done := make(chan outcome, 1)
	f.wg.Go(func() {
		sleep(f.ctx, slow)
		value, err := do()
		done <- outcome{value, err}
	})
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
		var none T
		return none, answer(n, "late", codes.Canceled, "context canceled")
	}
}

func answer(n nodes.Node, method string, code codes.Code, message string) error {
	return &nodes.Error{Node: n, Method: method, Err: status.Error(code, message)}
}

func jobOf(uid string) string {
	job, _, _ := strings.Cut(uid, ".")
	return job
}

func (f *fleet) Pull(ctx context.Context, n nodes.Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	node, err := f.node(ctx, n, "Pull")
	if err != nil {
		return nil, err
	}
	if f.loses(node) {
		_, _ = f.pull(node, n, r)
		sleep(ctx, 5*time.Second)
		return nil, &nodes.Error{Node: n, Method: "Pull", Silent: true,
			Err: status.Error(codes.DeadlineExceeded, "context deadline exceeded")}
	}
	return late(ctx, f, n, f.delay(node, true), func() (*opsv1.PullOperation, error) { return f.pull(node, n, r) })
}

func (f *fleet) pull(node *simNode, n nodes.Node, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if node.busy > 0 {
		node.busy--
		return nil, answer(n, "Pull", codes.ResourceExhausted, "too many operations")
	}
	bare := proto.Clone(r).(*opsv1.PullRequest)
	bare.Credentials = nil
	if p := node.pulls[r.GetUid()]; p != nil {
		if !proto.Equal(p.req, bare) {
			return nil, answer(n, "Pull", codes.AlreadyExists, "another request has this UID")
		}
		p.given = r.GetCredentials()
		if p.op.GetReason() == "CredentialsNeeded" {
			p.op.Reason = ""
			f.begin(node, p)
		}
		return proto.Clone(p.op).(*opsv1.PullOperation), nil
	}
	node.requests = append(node.requests, r)
	p := &simPull{req: bare, given: r.GetCredentials(), changed: make(chan struct{}), op: &opsv1.PullOperation{
		Uid: r.GetUid(), Image: r.GetImage(), Owner: r.GetOwner(), Phase: opsv1.PullPhase_PULL_WAITING,
		CreateTime: timestamppb.Now(),
	}}
	node.pulls[r.GetUid()] = p
	node.order = append(node.order, r.GetUid())
	job := jobOf(r.GetUid())
	f.inFlight[job]++
	f.peak[job] = max(f.peak[job], f.inFlight[job])
	if node.lacks {
		node.lacks = false
		p.op.Reason = "CredentialsNeeded"
	} else {
		f.begin(node, p)
	}
	return proto.Clone(p.op).(*opsv1.PullOperation), nil
}

// begin lets a pull go on. The caller holds the mutex.
func (f *fleet) begin(node *simNode, p *simPull) {
	ctx, cancel := context.WithCancel(f.ctx)
	p.cancel = cancel
	there := slices.ContainsFunc(slices.Collect(maps.Keys(node.pins)),
		func(pin simPin) bool { return pin.image == p.req.GetImage() })
	if there && p.req.GetPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		f.finish(node, p, opsv1.PullPhase_PULL_SUCCEEDED, "Present", "")
		cancel()
		return
	}
	takes, steps, outcome, stuck, endless := node.takes, node.steps, node.outcome, node.stuck, node.endless
	f.wg.Go(func() {
		defer cancel()
		if endless != "" {
			f.goOn(ctx, p, endless)
			return
		}
		if reason := f.knock(ctx, node, p); reason != "" {
			outcome, steps = reason, 0
		}
		for i := range steps {
			if !sleep(ctx, takes/time.Duration(steps)) {
				break
			}
			f.update(p, func(op *opsv1.PullOperation) {
				op.Phase, op.BytesTotal, op.BytesDone = opsv1.PullPhase_PULL_FETCHING, imageBytes,
					imageBytes*int64(i+1)/int64(steps)
				op.BytesFetched, op.Attempt, op.LastFailure = op.BytesDone, 1, nil
			})
		}
		if stuck && ctx.Err() == nil {
			bound := p.req.GetAttemptTimeout().AsDuration() * time.Duration(p.req.GetMaxAttempts())
			if sleep(ctx, bound) {
				outcome = "Timeout"
			}
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			f.finish(node, p, opsv1.PullPhase_PULL_CANCELLED, "Cancelled", p.reason)
		case outcome != "":
			f.finish(node, p, opsv1.PullPhase_PULL_FAILED, outcome, "the registry says "+outcome)
		default:
			f.finish(node, p, opsv1.PullPhase_PULL_SUCCEEDED, "Pulled", "")
		}
	})
}

// knock asks the registry as often as the pull may, and returns the reason of the last failure.
func (f *fleet) knock(ctx context.Context, node *simNode, p *simPull) (reason string) {
	for n := int32(1); ; n++ {
		f.mu.Lock()
		switch {
		case time.Now().Before(node.comes):
			reason = "NotFound"
		case node.user != "" &&
			!slices.ContainsFunc(p.given,
				func(c *opsv1.RegistryCredential) bool { return c.GetUsername() == node.user }):
			reason = "Unauthorized"
		default:
			reason = ""
		}
		f.mu.Unlock()
		if reason == "" || n >= p.req.GetMaxAttempts() {
			return reason
		}
		wait := min(time.Second<<min(n-1, 10), 30*time.Second)
		f.update(p, func(op *opsv1.PullOperation) {
			op.Phase, op.Reason, op.Attempt = opsv1.PullPhase_PULL_WAITING, "BackOff", n
			if node.old {
				op.Message = fmt.Sprintf("attempt %d of %d in %s: %s: the registry says no: look",
					n+1, p.req.GetMaxAttempts(), wait, reason)
				return
			}
			op.Message, op.MaxAttempts, op.RetryAfter = forPeople, p.req.GetMaxAttempts(), durationpb.New(wait)
			op.LastFailure = &opsv1.AttemptFailure{Reason: reason, Message: "the registry says no: look"}
		})
		if !sleep(ctx, wait) {
			return reason
		}
		f.update(p, func(op *opsv1.PullOperation) {
			op.Phase, op.Reason, op.Message, op.Attempt = opsv1.PullPhase_PULL_RESOLVING, "", "", n+1
			op.RetryAfter = nil
		})
	}
}

// goOn reports progress from time to time, and never ends.
func (f *fleet) goOn(ctx context.Context, p *simPull, how string) {
	for sleep(ctx, 7*time.Second) {
		f.update(p, func(op *opsv1.PullOperation) {
			if op.Phase, op.Reason = opsv1.PullPhase_PULL_WAITING, how; how == "Fetching" {
				op.Phase, op.Reason, op.Attempt = opsv1.PullPhase_PULL_FETCHING, "", 1
			}
		})
	}
}

func (f *fleet) update(p *simPull, change func(*opsv1.PullOperation)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.op.GetFinishTime() == nil {
		f.updateLocked(p, change)
	}
}

func (f *fleet) updateLocked(p *simPull, change func(*opsv1.PullOperation)) {
	change(p.op)
	close(p.changed)
	p.changed = make(chan struct{})
}

func (f *fleet) finish(node *simNode, p *simPull, phase opsv1.PullPhase, reason, message string) {
	if p.op.GetFinishTime() != nil {
		return
	}
	var notPinned, limitNotKept string
	if phase == opsv1.PullPhase_PULL_SUCCEEDED {
		if notPinned = node.full; notPinned == "" && p.req.GetPinFor().AsDuration() > 0 {
			node.pins[simPin{p.req.GetOwner(), p.req.GetImage()}] = true
		}
		if node.fast != "" {
			limitNotKept = "without the speed limit of 20.0 MiB/s: " + node.fast
		}
	}
	switch told := notPinned + limitNotKept; {
	case told != "" && node.old:
		var parts []string
		if notPinned != "" {
			parts = append(parts, "not pinned: "+notPinned)
		}
		if limitNotKept != "" {
			parts = append(parts, "pulled "+limitNotKept)
		}
		message, notPinned, limitNotKept = strings.Join(parts, "; "), "", ""
	case told != "":
		message = forPeople
	}
	f.inFlight[jobOf(p.op.GetUid())]--
	f.updateLocked(p, func(op *opsv1.PullOperation) {
		op.Phase, op.Reason, op.Message = phase, reason, message
		op.RetryAfter, op.LastFailure, op.NotPinned, op.LimitNotKept = nil, nil, notPinned, limitNotKept
		op.FinishTime = timestamppb.New(time.Now().Add(node.ahead))
	})
}

func (f *fleet) ListPulls(ctx context.Context, n nodes.Node) ([]*opsv1.PullOperation, error) {
	node, err := f.node(ctx, n, "ListPulls")
	if err != nil {
		return nil, err
	}
	return late(ctx, f, n, f.delay(node, false), func() (ops []*opsv1.PullOperation, err error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, uid := range slices.Backward(node.order) {
			ops = append(ops, proto.Clone(node.pulls[uid].op).(*opsv1.PullOperation))
		}
		return ops, nil
	})
}

func (f *fleet) WatchPull(
	ctx context.Context, n nodes.Node, uid string, each func(*opsv1.PullOperation) bool,
) error {
	node, err := f.node(ctx, n, "WatchPull")
	if err != nil {
		return err
	}
	for {
		f.mu.Lock()
		p := node.pulls[uid]
		if p == nil {
			f.mu.Unlock()
			return answer(n, "WatchPull", codes.NotFound, "no such pull")
		}
		op, changed, silent := proto.Clone(p.op).(*opsv1.PullOperation), p.changed, node.silent
		f.mu.Unlock()
		if silent { // a stream whose other end has vanished
			<-ctx.Done()
		}
		if ctx.Err() != nil {
			return answer(n, "WatchPull", codes.Canceled, "context canceled")
		}
		if !each(op) || op.GetFinishTime() != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func (f *fleet) CancelPull(ctx context.Context, n nodes.Node, uid, code, reason string) (*opsv1.PullOperation, error) {
	node, err := f.node(ctx, n, "CancelPull")
	if err != nil {
		return nil, err
	}
	return late(ctx, f, n, f.delay(node, false), func() (*opsv1.PullOperation, error) {
		return f.cancel(node, n, uid, code, reason)
	})
}

func (f *fleet) cancel(node *simNode, n nodes.Node, uid, code, reason string) (*opsv1.PullOperation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := node.pulls[uid]
	if p == nil {
		return nil, answer(n, "CancelPull", codes.NotFound, "no such pull")
	}
	if p.reason = reason; !node.old && p.op.GetFinishTime() == nil {
		p.op.CancelCode = code
	}
	f.finish(node, p, opsv1.PullPhase_PULL_CANCELLED, "Cancelled", reason)
	if p.cancel != nil {
		p.cancel()
	}
	return proto.Clone(p.op).(*opsv1.PullOperation), nil
}

func (f *fleet) ListPins(ctx context.Context, n nodes.Node) ([]*opsv1.ImagePin, error) {
	node, err := f.node(ctx, n, "ListPins")
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var pins []*opsv1.ImagePin
	for pin := range node.pins {
		image, err := reference.ParseNormalizedNamed(pin.image)
		if err != nil {
			return nil, answer(n, "ListPins", codes.Internal, err.Error())
		}
		pins = append(pins, &opsv1.ImagePin{ImageId: "id of " + pin.image, Image: reference.TagNameOnly(image).
			String(), Owner: pin.owner})
	}
	return pins, nil
}

func (f *fleet) ReleasePins(ctx context.Context, n nodes.Node, owner, imageID string) (int, error) {
	node, err := f.node(ctx, n, "ReleasePins")
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(node.pins)
	maps.DeleteFunc(node.pins, func(pin simPin, _ bool) bool {
		return pin.owner == owner && (imageID == "" || imageID == "id of "+pin.image)
	})
	return before - len(node.pins), nil
}

// forget makes a node forget all pulls that have ended, as a node does after an hour.
func (f *fleet) forget(name string) {
	f.change(name, func(n *simNode) {
		maps.DeleteFunc(n.pulls, func(_ string, p *simPull) bool { return p.op.GetFinishTime() != nil })
		n.order = slices.DeleteFunc(n.order, func(uid string) bool { return n.pulls[uid] == nil })
	})
}

// begun returns how many pulls began on each node.
func (f *fleet) begun(names ...string) map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts := map[string]int{}
	for name, n := range f.nodes {
		if len(names) == 0 || slices.Contains(names, name) {
			counts[name] = len(n.requests)
		}
	}
	return counts
}

// pulling returns what the node pulls.
func (f *fleet) pulling(name string) (images []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[name]
	for _, uid := range n.order {
		if p := n.pulls[uid]; p.op.GetFinishTime() == nil {
			images = append(images, p.req.GetImage())
		}
	}
	return images
}

// given returns whose credentials the last pull on the node has.
func (f *fleet) given(name string) (users []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[name]
	if len(n.order) == 0 {
		return nil
	}
	for _, c := range n.pulls[n.order[len(n.order)-1]].given {
		users = append(users, c.GetUsername())
	}
	return users
}

func (f *fleet) flying(job string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.inFlight[job]
}

// last returns the last request that began a pull on the node, or nil.
func (f *fleet) last(name string) *opsv1.PullRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.nodes[name].requests; len(r) > 0 {
		return r[len(r)-1]
	}
	return nil
}

func (f *fleet) requestsOf(name string) []*opsv1.PullRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.nodes[name].requests)
}

func (f *fleet) pinned(name string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var images []string
	for pin := range f.nodes[name].pins {
		images = append(images, pin.image)
	}
	slices.Sort(images)
	return images
}

// sleep waits and says whether to go on.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
