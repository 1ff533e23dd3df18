// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/test/address"
)

// Node serves the command interface as ops does: operations by UID, one at a
// time per slot, streams of their changes. Its containers are IDs in a map.
type Node struct {
	opsv1.UnimplementedOpsServer
	t *testing.T
	// Address is where the node listens.
	Address string
	files   nodes.Files
	server  *grpc.Server
	ended   chan struct{}
	runs    sync.WaitGroup

	// Swapped is called when the node has replaced a container, before the operation says so. It is
	// set before the first command.
	Swapped func(podUID, container, id string, attempt int32)

	mu       sync.Mutex
	ops      map[string]*operation
	order    []string
	slots    map[string]chan struct{} // one token each
	current  map[string]string        // slot → container ID
	attempts map[string]int32
	holds    map[string]chan struct{} // container/phase → closed to go on
	failures map[string]*opsv1.ContainerOperation
	refuse   error
	requests []*opsv1.RestartRequest
	cancels  []string
	nextID   int
}

type operation struct {
	op        *opsv1.Operation
	request   *opsv1.RestartRequest
	cancelled chan string
	changed   chan struct{}
}

// Serve returns a node that listens until the test ends.
func Serve(t *testing.T, files nodes.Files) *Node {
	n := &Node{
		t: t, files: files, ended: make(chan struct{}), ops: map[string]*operation{}, slots: map[string]chan struct{}{},
		current: map[string]string{}, attempts: map[string]int32{}, holds: map[string]chan struct{}{},
		failures: map[string]*opsv1.ContainerOperation{}, Swapped: func(string, string, string, int32) {},
	}
	n.Address = address.Reserve(t)
	n.serve(address.Listen(t, n.Address))
	t.Cleanup(func() {
		close(n.ended)
		n.server.Stop()
		n.runs.Wait()
	})
	return n
}

func (n *Node) serve(listener net.Listener) {
	n.server = grpc.NewServer(grpc.Creds(ServerCredentials(n.t, n.files)))
	opsv1.RegisterOpsServer(n.server, n)
	server := n.server
	n.runs.Go(func() { _ = server.Serve(listener) })
}

// Down makes the node unreachable until the returned function is called.
func (n *Node) Down() (up func()) {
	n.server.Stop()
	return func() { n.serve(address.Listen(n.t, n.Address)) }
}

// Hold stops operations on the container at the phase until release.
func (n *Node) Hold(container string, at opsv1.Phase) (release func()) {
	gate := make(chan struct{})
	n.mu.Lock()
	n.holds[container+"/"+at.String()] = gate
	n.mu.Unlock()
	return sync.OnceFunc(func() { close(gate) })
}

// Fail makes operations on the container end with the given account. An account without a phase
// only adds its warnings.
func (n *Node) Fail(container string, account *opsv1.ContainerOperation) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.failures[container] = account
}

// Run sets the ID of a container and how often it has been restarted.
func (n *Node) Run(podUID, container, id string, restarts int32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.current[podUID+"/"+container], n.attempts[podUID+"/"+container] = id, restarts
}

// ID is the ID of a container.
func (n *Node) ID(podUID, container string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.current[podUID+"/"+container]
}

// Operation is an operation as it is now, or nil.
func (n *Node) Operation(uid string) *opsv1.Operation {
	n.mu.Lock()
	defer n.mu.Unlock()
	if o := n.ops[uid]; o != nil {
		return proto.Clone(o.op).(*opsv1.Operation)
	}
	return nil
}

// Commanded are the containers of all restarts that were commanded, in order.
func (n *Node) Commanded() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var names []string
	for _, r := range n.requests {
		names = append(names, r.GetContainers()[0].GetName())
	}
	return names
}

// Requests are all restarts that were commanded, in order.
func (n *Node) Requests() []*opsv1.RestartRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.requests)
}

// Cancels are the UIDs of all operations that were cancelled, in order.
func (n *Node) Cancels() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.cancels)
}

// Refuse makes the node answer new restarts with an error, or with nil no more.
func (n *Node) Refuse(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refuse = err
}

// ForgetAll makes the node forget its operations.
func (n *Node) ForgetAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.ops)
	n.order = nil
}

// Started is how many containers the node has started.
func (n *Node) Started() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.nextID
}

// Restart implements the Ops service.
func (n *Node) Restart(_ context.Context, req *opsv1.RestartRequest) (*opsv1.Operation, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests = append(n.requests, req)
	if o := n.ops[req.GetUid()]; o != nil {
		if !proto.Equal(o.request, req) {
			return nil, status.Error(codes.AlreadyExists, "another request has this UID")
		}
		return proto.Clone(o.op).(*opsv1.Operation), nil
	}
	if n.refuse != nil {
		return nil, n.refuse
	}
	want := req.GetContainers()[0]
	slot := req.GetPod().GetUid() + "/" + want.GetName()
	id, ok := n.current[slot]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no container %s", want.GetName())
	}
	if n.slots[slot] == nil {
		n.slots[slot] = make(chan struct{}, 1)
		n.slots[slot] <- struct{}{}
	}
	if expected := pods.BareID(want.GetExpectedContainerId()); expected != "" && expected != id && !req.GetForce() {
		st, err := status.New(codes.FailedPrecondition, "container is another one now").
			WithDetails(&errdetails.ErrorInfo{Reason: "ExpectedIDDiffers"})
		if err != nil {
			n.t.Error(err)
		}
		return nil, st.Err()
	}
	o := &operation{
		request: req, cancelled: make(chan string, 1), changed: make(chan struct{}),
		op: &opsv1.Operation{
			Uid: req.GetUid(), Kind: "Restart", Pod: req.GetPod(), Requester: req.GetRequester(),
			CreateTime: timestamppb.Now(),
			Phase:      opsv1.Phase_PHASE_PENDING,
			Containers: []*opsv1.ContainerOperation{{Name: want.GetName(), Phase: opsv1.Phase_PHASE_PENDING}},
		},
	}
	n.ops[req.GetUid()] = o
	n.order = append(n.order, req.GetUid())
	n.runs.Go(func() { n.carryOut(o, slot, n.slots[slot]) })
	return proto.Clone(o.op).(*opsv1.Operation), nil
}

func (n *Node) update(o *operation, change func(*opsv1.ContainerOperation)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := o.op.Containers[0]
	change(c)
	o.op.Phase, o.op.Message = c.Phase, c.Message
	if c.Phase >= opsv1.Phase_PHASE_SUCCEEDED {
		o.op.FinishTime = timestamppb.Now()
	}
	close(o.changed)
	o.changed = make(chan struct{})
}

func (n *Node) carryOut(o *operation, slot string, token chan struct{}) {
	cancel := func(reason string) {
		n.update(o, func(c *opsv1.ContainerOperation) { c.Phase, c.Message = opsv1.Phase_PHASE_CANCELLED, reason })
	}
	name := o.request.GetContainers()[0].GetName()
	select {
	case <-token:
		defer func() { token <- struct{}{} }()
	case reason := <-o.cancelled:
		cancel(reason)
		return
	case <-n.ended:
		return
	}
	n.mu.Lock()
	incumbent := n.current[slot]
	attempt := n.attempts[slot] + 1
	n.mu.Unlock()
	expected := pods.BareID(o.request.GetContainers()[0].GetExpectedContainerId())
	if expected != incumbent && !o.request.GetForce() {
		n.update(o, func(c *opsv1.ContainerOperation) {
			c.Phase, c.Reason, c.Message = opsv1.Phase_PHASE_FAILED, "ExpectedIDDiffers", "container is another one now"
		})
		return
	}
	for _, phase := range []opsv1.Phase{
		opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_STOPPING, opsv1.Phase_PHASE_STARTING,
	} {
		n.update(o, func(c *opsv1.ContainerOperation) {
			c.Phase, c.IncumbentId, c.Attempt = phase, incumbent, uint32(attempt)
			if o.request.GetContainers()[0].GetOrder() == opsv1.Order_ORDER_START_FIRST {
				c.Method = "overlap"
			}
			if phase == opsv1.Phase_PHASE_STARTING {
				c.StopTime = timestamppb.Now()
			}
		})
		n.mu.Lock()
		gate, failure := n.holds[name+"/"+phase.String()], n.failures[name]
		n.mu.Unlock()
		if gate != nil {
			cancelled := o.cancelled
			if phase != opsv1.Phase_PHASE_STAGING {
				cancelled = nil // too late
			}
			select {
			case <-gate:
			case reason := <-cancelled:
				cancel(reason)
				return
			case <-n.ended:
				return
			}
		}
		switch {
		case failure.GetPhase() == opsv1.Phase_PHASE_UNSPECIFIED && phase == opsv1.Phase_PHASE_STARTING:
			n.update(o, func(c *opsv1.ContainerOperation) { c.Warnings = failure.GetWarnings() })
		case failure.GetPhase() != opsv1.Phase_PHASE_UNSPECIFIED:
			n.update(o, func(c *opsv1.ContainerOperation) { proto.Merge(c, failure) })
			return
		}
	}
	n.mu.Lock()
	n.nextID++
	id := fmt.Sprintf("new%d", n.nextID)
	n.current[slot], n.attempts[slot] = id, attempt
	n.mu.Unlock()
	n.Swapped(o.request.GetPod().GetUid(), name, id, attempt)
	n.update(o, func(c *opsv1.ContainerOperation) {
		c.Phase, c.SuccessorId, c.StartTime = opsv1.Phase_PHASE_SUCCEEDED, id, timestamppb.Now()
		c.Gap = durationpb.New(6 * time.Millisecond)
	})
}

// GetOperation implements the Ops service.
func (n *Node) GetOperation(_ context.Context, req *opsv1.GetOperationRequest) (*opsv1.Operation, error) {
	if op := n.Operation(req.GetUid()); op != nil {
		return op, nil
	}
	return nil, status.Error(codes.NotFound, "no such operation")
}

// WatchOperation implements the Ops service.
func (n *Node) WatchOperation(
	req *opsv1.WatchOperationRequest, stream grpc.ServerStreamingServer[opsv1.Operation],
) error {
	for {
		n.mu.Lock()
		o := n.ops[req.GetUid()]
		if o == nil {
			n.mu.Unlock()
			return status.Error(codes.NotFound, "no such operation")
		}
		op, changed := proto.Clone(o.op).(*opsv1.Operation), o.changed
		n.mu.Unlock()
		if err := stream.Send(op); err != nil || op.GetFinishTime() != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// ListOperations implements the Ops service.
func (n *Node) ListOperations(context.Context, *opsv1.ListOperationsRequest) (*opsv1.ListOperationsResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	answer := &opsv1.ListOperationsResponse{}
	for _, uid := range n.order {
		answer.Operations = append(answer.Operations, proto.Clone(n.ops[uid].op).(*opsv1.Operation))
	}
	return answer, nil
}

// CancelOperation implements the Ops service.
func (n *Node) CancelOperation(ctx context.Context, req *opsv1.CancelOperationRequest) (*opsv1.Operation, error) {
	n.mu.Lock()
	n.cancels = append(n.cancels, req.GetUid())
	o := n.ops[req.GetUid()]
	n.mu.Unlock()
	if o == nil {
		return nil, status.Error(codes.NotFound, "no such operation")
	}
	for asked := false; ; {
		n.mu.Lock()
		op, changed := proto.Clone(o.op).(*opsv1.Operation), o.changed
		n.mu.Unlock()
		if op.GetFinishTime() != nil {
			return op, nil
		}
		if op.GetPhase() > opsv1.Phase_PHASE_STAGING {
			return nil, status.Error(codes.FailedPrecondition, "the container is being stopped")
		}
		if !asked {
			asked = true
			o.cancelled <- req.GetReason()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
	}
}
