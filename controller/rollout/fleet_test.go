// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/retry"
)

// fleet are nodes that do as the Ops service says, in one process. It outlives controllers.
type fleet struct {
	mu    sync.Mutex
	nodes map[string]*simNode
	calls map[string]int
	// pulls are how long an image takes, breaks how its preparation fails: by what its name ends
	// with.
	pulls  time.Duration
	breaks map[string]string
	// holds is how long nodes keep what they have prepared; 0 means as long as they are asked to.
	holds time.Duration
	// fails is how restarts fail, lasts how long they take: 0 is a second.
	fails string
	lasts time.Duration
	// warnings are those of each container when an operation succeeds.
	warnings []string
	// swap lets the pod's container be replaced, for Restart.
	swap func(podUID, container, id string)
	// runs is the image that a pod's container runs.
	runs func(podUID, container string) string
	// moved says that the tag of a pod's container names another image by now.
	moved func(podUID, container string) bool
	// serial counts operations.
	serial int
	ctx    context.Context
	stop   context.CancelFunc
	wg     sync.WaitGroup
}

// simNode is one node. The fields say how it behaves.
type simNode struct {
	silent  bool // it does not answer
	refused bool // nothing listens
	deaf    bool // its preparations never end
	forgets bool // it loses its journal once, after a commit

	ops      map[string]*simOp
	requests []*opsv1.PrepareUpgradeRequest // those that began an operation
	restarts []*opsv1.RestartRequest
	pins     map[string]bool // by owner
}

type simOp struct {
	request  proto.Message
	op       *opsv1.Operation
	changed  chan struct{}
	upgrades []*opsv1.ContainerUpgrade
	// serial is the place among all operations, committed that the pod may have been changed for
	// it.
	serial    int
	committed bool
}

func newFleet() *fleet {
	f := &fleet{nodes: map[string]*simNode{}, calls: map[string]int{}, pulls: 2 * time.Second,
		breaks: map[string]string{}}
	f.ctx, f.stop = context.WithCancel(context.Background())
	return f
}

func (f *fleet) end() {
	f.stop()
	f.wg.Wait()
}

func (f *fleet) add(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[name] = &simNode{ops: map[string]*simOp{}, pins: map[string]bool{}}
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
		patience := 5 * time.Second
		if method == "WatchOperation" {
			patience = 24 * time.Hour
		}
		retry.Sleep(ctx, patience)
		return nil, fail(codes.DeadlineExceeded, "context deadline exceeded")
	}
	return node, ctx.Err()
}

func answer(n nodes.Node, method string, code codes.Code, message string) error {
	return &nodes.Error{Node: n, Method: method, Err: status.Error(code, message)}
}

func (f *fleet) update(o *simOp, change func(*opsv1.Operation)) {
	if o.op.GetFinishTime() != nil {
		return
	}
	change(o.op)
	switch o.op.GetPhase() {
	case opsv1.Phase_PHASE_SUCCEEDED, opsv1.Phase_PHASE_FAILED, opsv1.Phase_PHASE_CANCELLED:
		o.op.FinishTime = timestamppb.Now()
	}
	for _, c := range o.op.GetContainers() {
		c.Phase = o.op.GetPhase()
	}
	close(o.changed)
	o.changed = make(chan struct{})
}

func (f *fleet) PrepareUpgrade(
	ctx context.Context, n nodes.Node, r *opsv1.PrepareUpgradeRequest,
) (*opsv1.Operation, error) {
	const method = "PrepareUpgrade"
	node, err := f.node(ctx, n, method)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	bare := proto.Clone(r).(*opsv1.PrepareUpgradeRequest)
	bare.Credentials = nil
	if o := node.ops[r.GetUid()]; o != nil {
		if !proto.Equal(o.request, bare) {
			return nil, answer(n, method, codes.AlreadyExists, "another request has this UID")
		}
		return proto.Clone(o.op).(*opsv1.Operation), nil
	}
	node.requests = append(node.requests, proto.Clone(r).(*opsv1.PrepareUpgradeRequest))
	node.pins[r.GetOwner()] = true
	o := &simOp{request: bare, changed: make(chan struct{}), upgrades: r.GetContainers(), op: &opsv1.Operation{
		Uid: r.GetUid(), Kind: "Upgrade", Pod: r.GetPod(), Phase: opsv1.Phase_PHASE_PULLING,
		CreateTime: timestamppb.Now(),
	}}
	for _, other := range node.ops {
		if was, ok := other.request.(*opsv1.PrepareUpgradeRequest); ok && was.GetOwner() == r.GetOwner() &&
			was.GetPod().GetUid() == r.GetPod().GetUid() && !other.committed && share(was, bare) {
			f.cancel(other, "its owner wants something else")
		}
	}
	f.serial++
	o.serial = f.serial
	broken, cancelled := "", false
	for _, c := range r.GetContainers() {
		o.op.Containers = append(o.op.Containers, &opsv1.ContainerOperation{Name: c.GetName(), Image: c.GetImage(),
			Phase: opsv1.Phase_PHASE_PULLING, IncumbentId: withoutScheme(c.GetExpectedContainerId())})
		for suffix, reason := range f.breaks {
			if strings.HasSuffix(c.GetImage(), suffix) {
				broken = reason
			}
		}
	}
	node.ops[r.GetUid()] = o
	takes, deaf := f.pulls, node.deaf
	holds := cmp.Or(f.holds, r.GetHoldTimeout().AsDuration())
	f.wg.Go(func() {
		if deaf || !retry.Sleep(f.ctx, takes) {
			return
		}
		if !f.turn(node, o, r.GetPrepareTimeout().AsDuration()) {
			broken = "PrepareTimeout"
		} else if broken == "" && !slices.ContainsFunc(r.GetContainers(), func(c *opsv1.ContainerUpgrade) bool {
			return f.runs(r.GetPod().GetUid(), c.GetName()) != c.GetImage()
		}) {
			broken = "ImageUnchanged"
			if r.GetContainers()[0].GetPullPolicy() == opsv1.PullPolicy_PULL_POLICY_ALWAYS {
				cancelled = true
				if f.moved(r.GetPod().GetUid(), r.GetContainers()[0].GetName()) {
					broken = "ImageMoved"
				}
			}
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.update(o, func(op *opsv1.Operation) {
			op.Phase = opsv1.Phase_PHASE_PREPARED
			if broken != "" {
				op.Phase = opsv1.Phase_PHASE_FAILED
				if cancelled {
					op.Phase = opsv1.Phase_PHASE_CANCELLED
				}
				op.Containers[0].Reason, op.Containers[0].Message = broken, "the registry says "+broken
			}
		})
		f.wg.Go(func() {
			if !retry.Sleep(f.ctx, holds) {
				return
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if o.op.GetPhase() == opsv1.Phase_PHASE_PREPARED {
				f.update(o, func(op *opsv1.Operation) {
					op.Phase, op.Containers[0].Reason = opsv1.Phase_PHASE_FAILED, "HoldTimeout"
				})
			}
		})
	})
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

// share says that two commands have a container in common.
func share(a, b proto.Message) bool {
	of := func(m proto.Message) (names []string) {
		switch r := m.(type) {
		case *opsv1.PrepareUpgradeRequest:
			for _, c := range r.GetContainers() {
				names = append(names, c.GetName())
			}
		case *opsv1.RestartRequest:
			for _, c := range r.GetContainers() {
				names = append(names, c.GetName())
			}
		}
		return names
	}
	theirs := of(b)
	return slices.ContainsFunc(of(a), func(name string) bool { return slices.Contains(theirs, name) })
}

// turn waits until nothing that was there before has the pod's containers.
func (f *fleet) turn(node *simNode, o *simOp, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		f.mu.Lock()
		var first *simOp
		for _, other := range node.ops {
			if other.serial < o.serial && other.op.GetPod().GetUid() == o.op.GetPod().GetUid() &&
				other.op.GetFinishTime() == nil && share(other.request, o.request) {
				first = other
			}
		}
		if first == nil || o.op.GetFinishTime() != nil {
			f.mu.Unlock()
			return true
		}
		changed, over := first.changed, o.changed
		f.mu.Unlock()
		select {
		case <-changed:
		case <-over:
		case <-timer.C:
			return false
		case <-f.ctx.Done():
			return true
		}
	}
}

func (f *fleet) CommitUpgrade(
	ctx context.Context, n nodes.Node, r *opsv1.CommitUpgradeRequest,
) (*opsv1.Operation, error) {
	const method = "CommitUpgrade"
	uid := r.GetUid()
	node, err := f.node(ctx, n, method)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	o := node.ops[uid]
	switch {
	case o == nil:
		return nil, answer(n, method, codes.NotFound, "no such operation")
	case o.op.GetPhase() == opsv1.Phase_PHASE_ARMED:
	case o.op.GetPhase() != opsv1.Phase_PHASE_PREPARED:
		return nil, answer(n, method, codes.FailedPrecondition, "the operation is "+o.op.GetPhase().String())
	case node.forgets:
		node.forgets = false
		delete(node.ops, uid)
		close(o.changed)
		o.changed = make(chan struct{})
	default:
		o.committed = true
		f.wg.Go(func() {
			if retry.Sleep(f.ctx, 100*time.Millisecond) {
				f.mu.Lock()
				defer f.mu.Unlock()
				if o.op.GetPhase() == opsv1.Phase_PHASE_PREPARED {
					f.update(o, func(op *opsv1.Operation) { op.Phase = opsv1.Phase_PHASE_ARMED })
				}
			}
		})
	}
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

// adopt is what kubelet's calls make of an armed operation: it returns whether the node had one for
// the container and image.
func (f *fleet) adopt(nodeName, podUID, container, image, id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	node := f.nodes[nodeName]
	if node == nil {
		return false
	}
	for _, o := range node.ops {
		if o.op.GetPhase() != opsv1.Phase_PHASE_ARMED || o.op.GetPod().GetUid() != podUID {
			continue
		}
		i := slices.IndexFunc(o.upgrades, func(u *opsv1.ContainerUpgrade) bool {
			return u.GetName() == container &&
				u.GetImage() == image
		})
		if i < 0 {
			continue
		}
		o.op.Containers[i].SuccessorId = id
		done := true
		for _, c := range o.op.GetContainers() {
			done = done && c.GetSuccessorId() != ""
		}
		if done {
			f.succeed(o)
		}
		return true
	}
	return false
}

func (f *fleet) succeed(o *simOp) {
	f.update(o, func(op *opsv1.Operation) {
		op.Phase = opsv1.Phase_PHASE_SUCCEEDED
		for _, c := range op.GetContainers() {
			c.Warnings = f.warnings
		}
	})
}

func (f *fleet) AbortUpgrade(ctx context.Context, n nodes.Node, uid, reason string) (*opsv1.Operation, error) {
	const method = "AbortUpgrade"
	node, err := f.node(ctx, n, method)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	o := node.ops[uid]
	if o == nil {
		return nil, answer(n, method, codes.NotFound, "no such operation")
	}
	f.cancel(o, reason)
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

func (f *fleet) cancel(o *simOp, reason string) {
	f.update(o, func(op *opsv1.Operation) {
		op.Phase, op.Message = opsv1.Phase_PHASE_CANCELLED, reason
		for _, c := range op.GetContainers() {
			c.Reason = "Cancelled"
		}
	})
}

// unfinished are the operations that nodes still have.
func (f *fleet) unfinished() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for name, node := range f.nodes {
		for _, o := range node.ops {
			if o.op.GetFinishTime() == nil {
				all = append(all, fmt.Sprintf("%s: %s of %s is %s", name, o.op.GetUid(), o.op.GetPod().GetName(),
					o.op.GetPhase()))
			}
		}
	}
	return all
}

func (f *fleet) Restart(ctx context.Context, n nodes.Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	node, err := f.node(ctx, n, "Restart")
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := node.ops[r.GetUid()]; o != nil {
		return proto.Clone(o.op).(*opsv1.Operation), nil
	}
	node.restarts = append(node.restarts, r)
	f.serial++
	o := &simOp{request: r, changed: make(chan struct{}), serial: f.serial,
		op: &opsv1.Operation{Uid: r.GetUid(), Kind: "Restart", Pod: r.GetPod(), Phase: opsv1.Phase_PHASE_STAGING,
			CreateTime: timestamppb.Now()}}
	node.ops[r.GetUid()] = o
	fails, lasts := f.fails, cmp.Or(f.lasts, time.Second)
	f.wg.Go(func() {
		if !retry.Sleep(f.ctx, lasts) {
			return
		}
		if fails != "" {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.update(o, func(op *opsv1.Operation) {
				op.Phase = opsv1.Phase_PHASE_FAILED
				op.Containers = []*opsv1.ContainerOperation{{Name: r.GetContainers()[0].GetName(), Reason: fails,
					Message: "the node says " + fails}}
			})
			return
		}
		for _, c := range r.GetContainers() {
			id := fmt.Sprintf("restarted-%s-%s", r.GetUid(), c.GetName())
			f.swap(r.GetPod().GetUid(), c.GetName(), id)
			f.mu.Lock()
			o.op.Containers = append(o.op.Containers, &opsv1.ContainerOperation{Name: c.GetName(), SuccessorId: id})
			f.mu.Unlock()
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.succeed(o)
	})
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

func (f *fleet) GetOperation(ctx context.Context, n nodes.Node, uid string) (*opsv1.Operation, error) {
	node, err := f.node(ctx, n, "GetOperation")
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := node.ops[uid]; o != nil {
		return proto.Clone(o.op).(*opsv1.Operation), nil
	}
	return nil, answer(n, "GetOperation", codes.NotFound, "no such operation")
}

func (f *fleet) WatchOperation(ctx context.Context, n nodes.Node, uid string, each func(*opsv1.Operation)) error {
	node, err := f.node(ctx, n, "WatchOperation")
	if err != nil {
		return err
	}
	for first := true; ; first = false {
		f.mu.Lock()
		o := node.ops[uid]
		if o == nil {
			f.mu.Unlock()
			if !first { // its process has gone, and with it the journal
				return answer(n, "WatchOperation", codes.Unavailable, "error reading from server: EOF")
			}
			return answer(n, "WatchOperation", codes.NotFound, "no such operation")
		}
		op, changed, silent := proto.Clone(o.op).(*opsv1.Operation), o.changed, node.silent
		f.mu.Unlock()
		if silent { // a stream whose other end has vanished
			<-ctx.Done()
		}
		if ctx.Err() != nil {
			return answer(n, "WatchOperation", codes.Canceled, "context canceled")
		}
		if each(op); op.GetFinishTime() != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func (f *fleet) ReleasePins(ctx context.Context, n nodes.Node, owner, _ string) (int, error) {
	node, err := f.node(ctx, n, "ReleasePins")
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !node.pins[owner] {
		return 0, nil
	}
	delete(node.pins, owner)
	return 1, nil
}

// pinned is how many pins there are.
func (f *fleet) pinned() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, node := range f.nodes {
		n += len(node.pins)
	}
	return n
}

func (f *fleet) prepared() []*opsv1.PrepareUpgradeRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*opsv1.PrepareUpgradeRequest
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		all = append(all, f.nodes[name].requests...)
	}
	return all
}

// What the controller wants of nodes: how long they hold what is prepared, and how often a
// preparation begins anew.
const (
	nodeHolds = time.Hour
	rounds    = 8
)

// withoutScheme takes the runtime's scheme off a container ID.
func withoutScheme(id string) string {
	if _, bare, ok := strings.Cut(id, "://"); ok {
		return bare
	}
	return id
}
