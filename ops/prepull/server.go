// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"regexp"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/pins"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

// Bounds of a request.
const (
	maxCredentials = 256
	maxSecretBytes = 64 << 10
	maxLabels      = 256
	maxAttempts    = 100
	maxDuration    = 31 * 24 * time.Hour
	maxReason      = 1024
	maxCode        = 64
)

var uidForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

// Server serves the node's commands for images.
type Server struct {
	opsv1.UnimplementedImagesServer
	p *Puller
}

var _ opsv1.ImagesServer = (*Server)(nil)

// NewServer returns the command server of the puller.
func NewServer(p *Puller) *Server { return &Server{p: p} }

// Pull implements [opsv1.ImagesServer].
func (s *Server) Pull(_ context.Context, req *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	if err := validate(req); err != nil {
		return nil, err
	}
	return s.p.take(req, false)
}

func validate(req *opsv1.PullRequest) error {
	invalid := func(format string, args ...any) error { return status.Errorf(codes.InvalidArgument, format, args...) }
	switch {
	case !uidForm.MatchString(req.GetUid()):
		return invalid("uid must be 1 to 128 characters of [A-Za-z0-9._-], not %.140q", req.GetUid())
	case req.GetImage() == "":
		return invalid("image is empty: name one as in a pod spec")
	case req.GetPolicy() == opsv1.PullPolicy_PULL_POLICY_NEVER:
		return invalid("a pull with the policy Never would do nothing: leave the policy out")
	case opsv1.PullPolicy_name[int32(req.GetPolicy())] == "":
		return invalid("unknown policy %d", req.GetPolicy())
	case len(req.GetCredentials()) > maxCredentials:
		return invalid("%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	case len(req.GetSandboxLabels()) > maxLabels || len(req.GetSandboxAnnotations()) > maxLabels:
		return invalid("too many sandbox labels or annotations; the most is %d", maxLabels)
	case req.GetMaxAttempts() < 0 || req.GetMaxAttempts() > maxAttempts:
		return invalid("max_attempts must be between 0 and %d", maxAttempts)
	case req.GetPinPercent() < 0 || req.GetPinPercent() > 100:
		return invalid("pin_percent must be between 0 and 100")
	case req.GetBytesPerSecond() < 0:
		return invalid("bytes_per_second is negative")
	case len(req.GetOwner()) > 1024 || len(req.GetRuntimeHandler()) > 253:
		return invalid("owner or runtime_handler is too long")
	}
	for name, d := range map[string]interface{ AsDuration() time.Duration }{
		"attempt_timeout": req.GetAttemptTimeout(), "deadline": req.GetDeadline(), "pin_for": req.GetPinFor(),
	} {
		if v := d.AsDuration(); v < 0 || v > maxDuration {
			return invalid("%s must be between 0 and %s", name, maxDuration)
		}
	}
	for _, c := range req.GetCredentials() {
		size := len(c.GetMatch()) + len(c.GetUsername()) + len(c.GetPassword()) +
			len(c.GetIdentityToken()) + len(c.GetRegistryToken())
		if size > maxSecretBytes {
			return invalid("a credential is too large")
		}
	}
	if _, err := registry.Normalize(req.GetImage()); err != nil {
		return invalid("%v", err)
	}
	return nil
}

// GetPull implements [opsv1.ImagesServer].
func (s *Server) GetPull(_ context.Context, req *opsv1.GetPullRequest) (*opsv1.PullOperation, error) {
	op, _, err := s.p.watch(req.GetUid())
	return op, err
}

// WatchPull implements [opsv1.ImagesServer].
func (s *Server) WatchPull(req *opsv1.WatchPullRequest, stream grpc.ServerStreamingServer[opsv1.PullOperation]) error {
	for {
		op, changed, err := s.p.watch(req.GetUid())
		if err != nil {
			return err
		}
		if err := stream.Send(op); err != nil || op.GetFinishTime() != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// ListPulls implements [opsv1.ImagesServer].
func (s *Server) ListPulls(_ context.Context, req *opsv1.ListPullsRequest) (*opsv1.ListPullsResponse, error) {
	return &opsv1.ListPullsResponse{Pulls: s.p.list(req.GetActiveOnly())}, nil
}

// CancelPull implements [opsv1.ImagesServer].
func (s *Server) CancelPull(ctx context.Context, req *opsv1.CancelPullRequest) (*opsv1.PullOperation, error) {
	reason := req.GetReason()
	if reason == "" {
		reason = "cancelled"
	}
	if len(reason) > maxReason {
		return nil, status.Error(codes.InvalidArgument, "reason is too long")
	}
	if len(req.GetCode()) > maxCode {
		return nil, status.Error(codes.InvalidArgument, "code is too long")
	}
	op, changed, err := s.p.cancel(req.GetUid(), reason, req.GetCode())
	for err == nil && op.GetFinishTime() == nil {
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
		op, changed, err = s.p.watch(req.GetUid())
	}
	return op, err
}

// ListPins implements [opsv1.ImagesServer].
func (s *Server) ListPins(ctx context.Context, _ *opsv1.ListPinsRequest) (*opsv1.ListPinsResponse, error) {
	gone, err := s.p.gone(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, registry.Explain(err, "").Message) // no registry is asked
	}
	list := s.p.pins.List()
	for _, pin := range list {
		_, pin.Gone = slices.BinarySearch(gone, pin.GetImageId())
	}
	return &opsv1.ListPinsResponse{Pins: list, GoneImageIds: gone}, nil
}

// ReleasePins implements [opsv1.ImagesServer].
func (s *Server) ReleasePins(ctx context.Context, req *opsv1.ReleasePinsRequest) (*opsv1.ReleasePinsResponse, error) {
	if req.GetOwner() == "" {
		return nil, status.Error(codes.InvalidArgument,
			"owner is empty: name whose pins are to end, as ListPins shows it")
	}
	n, err := s.p.pins.Release(ctx, func(k pins.Key, _ *pins.Pin) bool {
		return k.Owner == req.GetOwner() && (req.GetImageId() == "" || req.GetImageId() == k.ImageID)
	})
	if err != nil {
		return nil, status.Errorf(codes.Internal, "%d released, then: %v", n, err)
	}
	return &opsv1.ReleasePinsResponse{Released: int32(n)}, nil
}
