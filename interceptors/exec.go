// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// processes takes the calls that need a container's process.
type processes struct{ view *view.View }

// execSync on a masked container runs while its process lives; after that it is Unavailable, which
// keeps a probe from counting a failure. It is always taken, because a probe that begins before the
// mask may be killed behind it, and one failure may be all that kubelet waits for.
func (p *processes) execSync(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ExecSyncRequest{})
	if err != nil {
		return nil, err
	}
	b, err := p.inContainer(ctx, req.GetContainerId(), raw, next)
	if err != nil || !p.masked(req.GetContainerId()) {
		return b, err
	}
	resp, err := decode(b, &runtimeapi.ExecSyncResponse{})
	if err != nil {
		return nil, err
	}
	if resp.GetExitCode() != 0 {
		did(ctx, didRefuse)
		// A probe that the stop has killed, or that fails because the app drains.
		return nil, maskedDead(req.GetContainerId())
	}
	return b, nil
}

// exec is execSync for the streaming form; the URL is the runtime's own.
func (p *processes) exec(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ExecRequest{})
	if err != nil {
		return nil, err
	}
	return p.inContainer(ctx, req.GetContainerId(), raw, next)
}

func (p *processes) attach(ctx context.Context, _ string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.AttachRequest{})
	if err != nil {
		return nil, err
	}
	return p.inContainer(ctx, req.GetContainerId(), raw, next)
}

func (p *processes) checkpointContainer(
	ctx context.Context, _ string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.CheckpointContainerRequest{})
	if err != nil {
		return nil, err
	}
	return p.inContainer(ctx, req.GetContainerId(), raw, next)
}

// reopenContainerLog on a masked container that has stopped is done: its log is complete.
func (p *processes) reopenContainerLog(
	ctx context.Context, _ string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.ReopenContainerLogRequest{})
	if err != nil {
		return nil, err
	}
	b, err := p.inContainer(ctx, req.GetContainerId(), raw, next)
	if status.Code(err) == codes.Unavailable && p.masked(req.GetContainerId()) {
		did(ctx, didMask)
		return encode(&runtimeapi.ReopenContainerLogResponse{})
	}
	return b, err
}

// inContainer forwards a call that needs the container's process.
func (p *processes) inContainer(ctx context.Context, id string, raw []byte, next proxy.UnaryNext) ([]byte, error) {
	if staged(p.view, id) {
		did(ctx, didHide)
		return nil, notFound(id)
	}
	b, err := next(ctx, raw)
	if err != nil && p.masked(id) { // a timeout as well: kubelet's prober counts DeadlineExceeded as a failure
		did(ctx, didRefuse)
		return nil, maskedDead(id)
	}
	return b, err
}

func (p *processes) masked(id string) bool {
	claim, full := p.view.ByContainer(id)
	return claim != nil && p.view.Verdict(full) == view.Masked
}

func logrusFields(s view.Slot, method string) logrus.Fields {
	f := logrus.Fields{"pod": s.PodUID, "container": s.Container}
	if method != "" {
		f["method"] = method
	}
	return f
}
