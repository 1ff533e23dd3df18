// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"slices"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// listDefault is how many operations ListOperations returns, unless the caller wants fewer.
const listDefault = 500

// InfoFunc returns what the engine does not know of [opsv1.NodeInfoResponse]: the
// engine adds active slots and the counters of operations and records.
type InfoFunc func(context.Context) *opsv1.NodeInfoResponse

// Server serves the node's commands.
type Server struct {
	opsv1.UnimplementedOpsServer
	e    *Engine
	info InfoFunc
}

var _ opsv1.OpsServer = (*Server)(nil)

// NewServer returns the command server of the engine.
func NewServer(e *Engine, info InfoFunc) *Server { return &Server{e: e, info: info} }

// Restart implements [opsv1.OpsServer].
func (s *Server) Restart(ctx context.Context, req *opsv1.RestartRequest) (*opsv1.Operation, error) {
	_, remote := callerOf(ctx)
	req = proto.Clone(req).(*opsv1.RestartRequest)
	given := takeEnvironments(req)
	if err := errors.Join(validateRestart(req, remote), validateEnvironments(given)); err != nil {
		return nil, err
	}
	c := operation.RestartCommand(req, given)
	if known := s.e.operations.lookup(req.GetUid()); known != nil {
		if err := known.Repeat(c); err != nil {
			return nil, err
		}
		return known.Snapshot(), nil
	}
	if s.e.node.Images.Puller == nil && slices.ContainsFunc(req.GetContainers(),
		func(c *opsv1.ContainerRestart) bool { return c.GetImage() != "" || c.GetRevertImage() }) {
		return nil, status.Error(codes.FailedPrecondition,
			"this node pulls no images, which a restart with another image needs")
	}
	pod, err := s.precheck(ctx, req)
	if err != nil {
		return nil, err
	}
	o, err := s.e.operations.accept(c, pod)
	if err != nil {
		return nil, err
	}
	return o.Snapshot(), nil
}

// precheck refuses at once what cannot work, so that nothing is journaled for it.
func (s *Server) precheck(ctx context.Context, req *opsv1.RestartRequest) (*opsv1.PodRef, error) {
	if err := s.e.Judge(ctx); err != nil {
		return nil, precheckError(err)
	}
	sandbox, err := s.e.node.Sandbox(ctx, req.GetPod())
	if err != nil {
		return nil, precheckError(err)
	}
	pod := proto.Clone(req.GetPod()).(*opsv1.PodRef)
	pod.Uid = sandbox.GetMetadata().GetUid()
	for _, c := range req.GetContainers() {
		slot := view.Slot{PodUID: pod.GetUid(), Container: c.GetName()}
		if err := s.e.node.Lost.Refuse(slot); err != nil {
			return nil, precheckError(err)
		}
		if err := s.precheckContainer(ctx, pod, slot, c, req.GetForce()); err != nil {
			return nil, precheckError(err)
		}
	}
	return pod, nil
}

// precheckTries is how often the runtime is asked once more for a container whose pod another
// operation works on meanwhile.
const precheckTries = 3

// precheckContainer refuses a container that cannot be restarted. A container that an operation
// works on is checked when its slot is free. What the runtime says counts only if no operation has
// taken a slot meanwhile: it may be about the container that such an operation has made.
func (s *Server) precheckContainer(
	ctx context.Context, pod *opsv1.PodRef, slot view.Slot, c *opsv1.ContainerRestart, force bool,
) error {
	for range precheckTries {
		taken := s.e.node.View.Taken()
		if s.e.node.View.Claimed(slot) {
			return nil
		}
		_, err := s.e.node.Resolve(ctx, pod, c, force)
		if c.GetRevertImage() && (err == nil || imagechange.NotRunning(err)) {
			err = nil
			if s.e.node.Overrides.Of(slot) == nil {
				err = imagechange.NotOverridden(c.GetName())
			}
		}
		if err == nil || s.e.node.View.Taken() == taken {
			return err
		}
	}
	return nil
}

func precheckError(err error) error {
	var out *operation.Outcome
	if !errors.As(err, &out) {
		if status.Code(err) == codes.Unknown {
			return status.Errorf(codes.Internal, "asking the runtime: %v", err)
		}
		return err
	}
	code := codes.FailedPrecondition
	if out.Reason == opsv1.ReasonNotFound {
		code = codes.NotFound
	}
	st := status.New(code, out.Message)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: out.Reason,
		Domain: opsv1.ErrorDomain}); err == nil {
		st = detailed
	}
	return st.Err()
}

// GetOperation implements [opsv1.OpsServer].
func (s *Server) GetOperation(_ context.Context, req *opsv1.GetOperationRequest) (*opsv1.Operation, error) {
	o := s.e.operations.lookup(req.GetUid())
	if o == nil {
		return nil, noOperation(req.GetUid())
	}
	return o.Snapshot(), nil
}

// WatchOperation implements [opsv1.OpsServer].
func (s *Server) WatchOperation(
	req *opsv1.WatchOperationRequest, stream grpc.ServerStreamingServer[opsv1.Operation],
) error {
	o := s.e.operations.lookup(req.GetUid())
	if o == nil {
		return noOperation(req.GetUid())
	}
	for {
		op, changed := o.Watch()
		if err := stream.Send(op); err != nil {
			return err
		}
		if op.GetFinishTime() != nil {
			return nil
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// ListOperations implements [opsv1.OpsServer].
func (s *Server) ListOperations(
	_ context.Context, req *opsv1.ListOperationsRequest,
) (*opsv1.ListOperationsResponse, error) {
	limit := int(req.GetLimit())
	if limit < 0 || limit > listDefault {
		return nil, status.Errorf(codes.InvalidArgument, "limit must be between 0 and %d, not %d", listDefault, limit)
	}
	if limit == 0 {
		limit = listDefault
	}
	resp := &opsv1.ListOperationsResponse{}
	for _, op := range s.e.operations.list() {
		if len(resp.Operations) == limit {
			break
		}
		if !req.GetActiveOnly() || op.GetFinishTime() == nil {
			resp.Operations = append(resp.Operations, op)
		}
	}
	return resp, nil
}

// CancelOperation implements [opsv1.OpsServer].
func (s *Server) CancelOperation(ctx context.Context, req *opsv1.CancelOperationRequest) (*opsv1.Operation, error) {
	o := s.e.operations.lookup(req.GetUid())
	if o == nil {
		return nil, noOperation(req.GetUid())
	}
	if len(req.GetReason()) > maxHookBytes {
		return nil, status.Error(codes.InvalidArgument, "reason is too long")
	}
	caller, _ := callerOf(ctx)
	reason := req.GetReason()
	if reason == "" {
		reason = "cancelled by " + caller
	}
	if err := o.Cancel(reason); err != nil {
		return nil, err
	}
	// The operation takes back what it has staged; tell the caller how it ended.
	for {
		op, changed := o.Watch()
		if op.GetFinishTime() != nil {
			return op, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
	}
}

// NodeInfo implements [opsv1.OpsServer].
func (s *Server) NodeInfo(ctx context.Context, _ *opsv1.NodeInfoRequest) (*opsv1.NodeInfoResponse, error) {
	info := s.info(ctx)
	if info.Counters == nil {
		info.Counters = &opsv1.Counters{}
	}
	for _, op := range s.e.operations.list() {
		switch {
		case op.GetFinishTime() == nil:
			for _, c := range op.GetContainers() {
				if !operation.HasEnded(c.GetPhase()) {
					info.ActiveSlots = append(info.ActiveSlots, &opsv1.ActiveSlot{
						PodUid: op.GetPod().GetUid(), Container: c.GetName(), OperationUid: op.GetUid(),
						Phase: c.GetPhase(),
					})
				}
			}
		case op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED:
			info.Counters.OperationsSucceeded++
		default:
			info.Counters.OperationsFailed++
		}
	}
	info.RestartMethods = s.e.node.Switchover.List()
	if err := s.e.JournalError(); err != nil {
		info.JournalError = err.Error()
	}
	info.Counters.RecordedContainers = uint64(s.e.node.Records.Len())
	return info, nil
}

func noOperation(uid string) error {
	return status.Errorf(codes.NotFound, "no operation %q on this node; finished ones are kept for %s",
		uid, keepFinished)
}

// callerOf returns who calls, for the audit line, and whether they come over the network.
func callerOf(ctx context.Context) (name string, remote bool) {
	if name, ok := mtls.ClientName(ctx); ok {
		return name, true
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "in-process", false
	}
	if p.Addr.Network() == "unix" {
		return "admin socket", false
	}
	return p.Addr.String(), true
}
