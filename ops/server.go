// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"regexp"
	"slices"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// Bounds of a request; far above what a pod can have.
const (
	maxContainers  = 64
	maxHookArgs    = 256
	maxHookBytes   = 64 << 10
	maxGraceSecond = 24 * 60 * 60
	maxMinReady    = 60 * 60
	maxRequest     = 256 << 10 // finished operations are kept with theirs
	listDefault    = 500

	// errorDomain is the domain of the ErrorInfo that carries a Reason* constant.
	errorDomain = "cri-proxy.io"
)

var (
	uidForm  = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
)

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
	if known := s.e.lookup(req.GetUid()); known != nil {
		if err := known.Repeat(c); err != nil {
			return nil, err
		}
		return known.Snapshot(), nil
	}
	if s.e.images == nil && slices.ContainsFunc(req.GetContainers(), func(c *opsv1.ContainerRestart) bool { return c.GetImage() != "" || c.GetRevertImage() }) {
		return nil, status.Error(codes.FailedPrecondition, "this node pulls no images, which a restart with another image needs")
	}
	pod, err := s.precheck(ctx, req)
	if err != nil {
		return nil, err
	}
	o, err := s.e.accept(c, pod)
	if err != nil {
		return nil, err
	}
	return o.Snapshot(), nil
}

// precheck refuses at once what cannot work, so that nothing is journaled for it.
// A container that is being restarted already is checked when its turn comes.
func (s *Server) precheck(ctx context.Context, req *opsv1.RestartRequest) (*opsv1.PodRef, error) {
	if err := s.e.Judge(ctx); err != nil {
		return nil, precheckError(err)
	}
	sandbox, err := s.e.sandboxOf(ctx, req.GetPod())
	if err != nil {
		return nil, precheckError(err)
	}
	pod := proto.Clone(req.GetPod()).(*opsv1.PodRef)
	pod.Uid = sandbox.GetMetadata().GetUid()
	for _, c := range req.GetContainers() {
		slot := interceptors.Slot{PodUID: pod.GetUid(), Container: c.GetName()}
		if err := s.e.refuseLeft(slot); err != nil {
			return nil, precheckError(err)
		}
		if s.e.view.Claimed(slot) {
			continue
		}
		_, err := s.e.resolve(ctx, pod, c, req.GetForce())
		if c.GetRevertImage() && (err == nil || notRunning(err)) {
			err = nil
			if s.e.overrides.Of(slot) == nil {
				err = notOverridden(c.GetName())
			}
		}
		if err != nil {
			return nil, precheckError(err)
		}
	}
	return pod, nil
}

func precheckError(err error) error {
	var out *outcome
	if !errors.As(err, &out) {
		if status.Code(err) == codes.Unknown {
			return status.Errorf(codes.Internal, "asking the runtime: %v", err)
		}
		return err
	}
	code := codes.FailedPrecondition
	if out.Reason == ReasonNotFound {
		code = codes.NotFound
	}
	st := status.New(code, out.Message)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: out.Reason, Domain: errorDomain}); err == nil {
		st = detailed
	}
	return st.Err()
}

// GetOperation implements [opsv1.OpsServer].
func (s *Server) GetOperation(_ context.Context, req *opsv1.GetOperationRequest) (*opsv1.Operation, error) {
	o := s.e.lookup(req.GetUid())
	if o == nil {
		return nil, noOperation(req.GetUid())
	}
	return o.Snapshot(), nil
}

// WatchOperation implements [opsv1.OpsServer].
func (s *Server) WatchOperation(req *opsv1.WatchOperationRequest, stream grpc.ServerStreamingServer[opsv1.Operation]) error {
	o := s.e.lookup(req.GetUid())
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
func (s *Server) ListOperations(_ context.Context, req *opsv1.ListOperationsRequest) (*opsv1.ListOperationsResponse, error) {
	limit := int(req.GetLimit())
	if limit < 0 || limit > listDefault {
		return nil, status.Errorf(codes.InvalidArgument, "limit must be between 0 and %d, not %d", listDefault, limit)
	}
	if limit == 0 {
		limit = listDefault
	}
	resp := &opsv1.ListOperationsResponse{}
	for _, op := range s.e.list() {
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
	o := s.e.lookup(req.GetUid())
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
	for _, op := range s.e.list() {
		switch {
		case op.GetFinishTime() == nil:
			for _, c := range op.GetContainers() {
				if !operation.HasEnded(c.GetPhase()) {
					info.ActiveSlots = append(info.ActiveSlots, &opsv1.ActiveSlot{
						PodUid: op.GetPod().GetUid(), Container: c.GetName(), OperationUid: op.GetUid(), Phase: c.GetPhase(),
					})
				}
			}
		case op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED:
			info.Counters.OperationsSucceeded++
		default:
			info.Counters.OperationsFailed++
		}
	}
	info.RestartMethods = s.e.switchover.List()
	if err := s.e.JournalError(); err != nil {
		info.JournalError = err.Error()
	}
	info.Counters.RecordedContainers = uint64(s.e.records.Len())
	return info, nil
}

func noOperation(uid string) error {
	return status.Errorf(codes.NotFound, "no operation %q on this node; finished ones are kept for %s", uid, keepFinished)
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

// validateRestart checks the request by itself.
func validateRestart(req *opsv1.RestartRequest, remote bool) error {
	invalid := func(format string, args ...any) error { return status.Errorf(codes.InvalidArgument, format, args...) }
	switch {
	case !uidForm.MatchString(req.GetUid()):
		return invalid("uid must be 1 to 128 characters of [A-Za-z0-9._-], not %.140q", req.GetUid())
	case !nameForm.MatchString(req.GetPod().GetNamespace()) || !nameForm.MatchString(req.GetPod().GetName()):
		return invalid("pod.namespace and pod.name must be Kubernetes names, not %.260q and %.260q", req.GetPod().GetNamespace(), req.GetPod().GetName())
	case remote && req.GetPod().GetUid() == "":
		return invalid("pod.uid is required, so that a pod of the same name that came later is never meant")
	case len(req.GetPod().GetUid()) > 128:
		return invalid("pod.uid is too long")
	case len(req.GetContainers()) == 0:
		return invalid("containers is empty: name the containers to restart")
	case len(req.GetContainers()) > maxContainers:
		return invalid("%d containers are too many; the most is %d", len(req.GetContainers()), maxContainers)
	case len(req.GetRequester()) > 1024:
		return invalid("requester is too long")
	case len(req.GetCredentials()) > maxCredentials:
		return invalid("%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	case proto.Size(req)-proto.Size(&opsv1.RestartRequest{Credentials: req.GetCredentials()}) > maxRequest:
		return invalid("the request is larger than %d bytes: the journal keeps it", maxRequest)
	}
	seen := map[string]bool{}
	for _, c := range req.GetContainers() {
		name := c.GetName()
		switch {
		case !nameForm.MatchString(name):
			return invalid("container name %.260q is not a Kubernetes name", name)
		case seen[name]:
			return invalid("container %q is named twice", name)
		case c.GracePeriodSeconds != nil && (c.GetGracePeriodSeconds() < 0 || c.GetGracePeriodSeconds() > maxGraceSecond):
			return invalid("container %q: grace_period_seconds must be between 0 and %d", name, maxGraceSecond)
		case opsv1.Order_name[int32(c.GetOrder())] == "":
			return invalid("container %q: unknown order %d", name, c.GetOrder())
		case c.GetMinReadySeconds() < 0 || c.GetMinReadySeconds() > maxMinReady:
			return invalid("container %q: min_ready_seconds must be between 0 and %d", name, maxMinReady)
		case c.GetMinReadySeconds() != 0 && c.GetOrder() != opsv1.Order_ORDER_START_FIRST:
			return invalid("container %q: min_ready_seconds is for ORDER_START_FIRST only", name)
		case c.GetHoldProbes() != nil && (!c.GetHoldProbes().IsValid() || c.GetHoldProbes().AsDuration() < 0 || c.GetHoldProbes().AsDuration() > maxHoldProbes):
			return invalid("container %q: hold_probes must be between 0 and %s", name, maxHoldProbes)
		case len(c.GetExpectedContainerId()) > 256:
			return invalid("container %q: expected_container_id is too long", name)
		case len(c.GetImage()) > maxImage:
			return invalid("container %q: image is longer than %d bytes", name, maxImage)
		case c.GetImage() != "" && c.GetRevertImage():
			return invalid("container %q: image and revert_image exclude each other", name)
		case opsv1.PullPolicy_name[int32(c.GetPullPolicy())] == "":
			return invalid("container %q: unknown pull policy %d", name, c.GetPullPolicy())
		}
		seen[name] = true
		for field, h := range map[string]*opsv1.Hook{"pre_stop": c.GetPreStop(), "post_start": c.GetPostStart()} {
			if err := validateHook(h); err != nil {
				return invalid("container %q: %s: %v", name, field, err)
			}
		}
	}
	return nil
}

func validateHook(h *opsv1.Hook) error {
	if h == nil {
		return nil
	}
	if proto.Size(h) > maxHookBytes {
		return errors.New("the hook is too large")
	}
	switch a := h.GetAction().(type) {
	case *opsv1.Hook_Exec:
		if n := len(a.Exec.GetCommand()); n == 0 || n > maxHookArgs {
			return errors.New("exec.command must have between 1 and 256 words")
		}
	case *opsv1.Hook_HttpGet:
		if p := a.HttpGet.GetPort(); p < 1 || p > 65535 {
			return errors.New("http_get.port must be between 1 and 65535 (named ports are resolved by the caller)")
		}
		switch a.HttpGet.GetScheme() {
		case "", "HTTP", "HTTPS", "http", "https":
		default:
			return errors.New("http_get.scheme must be HTTP or HTTPS")
		}
	case *opsv1.Hook_Sleep:
		if s := a.Sleep.GetSeconds(); s < 0 || s > maxGraceSecond {
			return errors.New("sleep.seconds is out of range")
		}
	default:
		return errors.New("the hook has no action (exec, http_get, sleep)")
	}
	return nil
}
