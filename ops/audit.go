// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"path"
	"strings"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// maxAudited bounds each field of an audit line; what a refused request holds may be anything.
const maxAudited = 512

// Audit logs one line for each command, accepted or refused: who (client, remote), what (method,
// op, pod, container, image), for whom (requester, the custom resource or the user of the command
// line) and the result (code, error). What only looks is not logged. Nothing of a request but these
// is: it may hold credentials, and the words of hooks.
func Audit(log logrus.FieldLogger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		resp, err := handler(ctx, req)
		f := audited(req)
		if f == nil {
			return resp, err
		}
		if err == nil {
			f.complete(resp)
		}
		client, _ := callerOf(ctx)
		fields := logrus.Fields{"audit": "command", "method": path.Base(info.FullMethod), "client": client,
			"code": status.Code(err).String()}
		if p, ok := peer.FromContext(ctx); ok && p.Addr.Network() != "unix" {
			fields["remote"] = p.Addr.String()
		}
		for key, value := range map[string]string{
			"op": f.op, "pod": f.pod, "podUID": f.podUID, "container": strings.Join(f.containers, ","),
			"image": strings.Join(f.images, ","), "requester": f.requester,
		} {
			if value != "" {
				fields[key] = clipped(value)
			}
		}
		if code := status.Code(err); code == codes.OK {
			log.WithFields(fields).Info("command accepted")
		} else {
			fields[logrus.ErrorKey] = clipped(status.Convert(err).Message())
			log.WithFields(fields).Warn("command refused")
		}
		return resp, err
	}
}

func clipped(s string) string {
	if len(s) > maxAudited {
		return strings.ToValidUTF8(s[:maxAudited], "") + "..."
	}
	return s
}

// audit is what a line tells of a command.
type audit struct {
	op, pod, podUID, requester string
	containers, images         []string
}

// audited is what the request says; nil: it changes nothing.
func audited(req any) *audit {
	switch r := req.(type) {
	case *opsv1.RestartRequest:
		a := &audit{op: r.GetUid(), requester: r.GetRequester()}
		a.of(r.GetPod())
		for _, c := range r.GetContainers() {
			a.add(c.GetName(), c.GetImage())
		}
		return a
	case *opsv1.PrepareUpgradeRequest:
		a := &audit{op: r.GetUid(), requester: r.GetRequester()}
		a.of(r.GetPod())
		for _, c := range r.GetContainers() {
			a.add(c.GetName(), c.GetImage())
		}
		return a
	case *opsv1.CommitUpgradeRequest:
		return &audit{op: r.GetUid()}
	case *opsv1.AbortUpgradeRequest:
		return &audit{op: r.GetUid()}
	case *opsv1.CancelOperationRequest:
		return &audit{op: r.GetUid()}
	case *opsv1.PullRequest:
		return &audit{op: r.GetUid(), requester: r.GetOwner(), images: []string{r.GetImage()}}
	case *opsv1.CancelPullRequest:
		return &audit{op: r.GetUid()}
	case *opsv1.ReleasePinsRequest:
		return &audit{requester: r.GetOwner(), images: []string{r.GetImageId()}}
	}
	return nil
}

func (a *audit) of(p *opsv1.PodRef) {
	if p != nil {
		a.pod, a.podUID = podName(p), p.GetUid()
	}
}

func (a *audit) add(container, image string) {
	a.containers = append(a.containers, container)
	if image != "" {
		a.images = append(a.images, image)
	}
}

// complete adds what only the operation knows: a commit or a cancel names it by its UID.
func (a *audit) complete(resp any) {
	switch o := resp.(type) {
	case *opsv1.Operation:
		if a.pod == "" || a.podUID == "" {
			a.of(o.GetPod())
		}
		if a.requester == "" {
			a.requester = o.GetRequester()
		}
		if len(a.containers) == 0 {
			for _, c := range o.GetContainers() {
				a.add(c.GetName(), c.GetImage())
			}
		}
	case *opsv1.PullOperation:
		if a.requester == "" {
			a.requester = o.GetOwner()
		}
		if len(a.images) == 0 {
			a.images = []string{o.GetImage()}
		}
	}
}
