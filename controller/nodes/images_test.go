// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes_test

import (
	"context"
	"errors"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/test/address"
	"github.com/cri-proxy/cri-proxy/test/fleet"
)

// imageNode says of each command that it has come in.
type imageNode struct {
	opsv1.UnimplementedImagesServer
}

func (imageNode) Pull(_ context.Context, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	return &opsv1.PullOperation{Uid: r.GetUid(), Image: r.GetImage()}, nil
}

func (imageNode) ListPulls(context.Context, *opsv1.ListPullsRequest) (*opsv1.ListPullsResponse, error) {
	return &opsv1.ListPullsResponse{Pulls: []*opsv1.PullOperation{{Uid: "a"}, {Uid: "b"}}}, nil
}

func (imageNode) CancelPull(context.Context, *opsv1.CancelPullRequest) (*opsv1.PullOperation, error) {
	return nil, status.Error(codes.NotFound, "no such pull")
}

func (imageNode) ListPins(context.Context, *opsv1.ListPinsRequest) (*opsv1.ListPinsResponse, error) {
	return &opsv1.ListPinsResponse{Pins: []*opsv1.ImagePin{{ImageId: "i"}}}, nil
}

func (imageNode) ReleasePins(_ context.Context, r *opsv1.ReleasePinsRequest) (*opsv1.ReleasePinsResponse, error) {
	return &opsv1.ReleasePinsResponse{Released: int32(len(r.GetOwner()) + len(r.GetImageId()))}, nil
}

func (imageNode) WatchPull(r *opsv1.WatchPullRequest, stream grpc.ServerStreamingServer[opsv1.PullOperation]) error {
	for done := range int64(3) {
		if err := stream.Send(&opsv1.PullOperation{Uid: r.GetUid(), BytesDone: done}); err != nil {
			return err
		}
	}
	return stream.Send(&opsv1.PullOperation{Uid: r.GetUid(), FinishTime: timestamppb.Now()})
}

func newImageNode(t *testing.T, files nodes.Files) (address string) {
	t.Helper()
	server := grpc.NewServer(grpc.Creds(fleet.ServerCredentials(t, files)))
	opsv1.RegisterImagesServer(server, imageNode{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-ended
	})
	return listener.Addr().String()
}

func TestImageCommands(t *testing.T) {
	ca := fleet.NewCA(t)
	c := newClient(t, ca.Issue("cri-controller"))
	n := nodes.Node{Name: "node-1", Address: newImageNode(t, ca.Issue("node-1"))}
	ctx := t.Context()
	if op, err := c.Pull(ctx, n, &opsv1.PullRequest{Uid: "u", Image: "i"}); err != nil || op.GetUid() != "u" ||
		op.GetImage() != "i" {
		t.Errorf("Pull: %v, %v", op, err)
	}
	if ops, err := c.ListPulls(ctx, n); err != nil || len(ops) != 2 {
		t.Errorf("ListPulls: %v, %v", ops, err)
	}
	if pins, err := c.ListPins(ctx, n); err != nil || len(pins) != 1 {
		t.Errorf("ListPins: %v, %v", pins, err)
	}
	if k, err := c.ReleasePins(ctx, n, "own", "id"); err != nil || k != 5 {
		t.Errorf("ReleasePins: %v, %v", k, err)
	}
	var nodeError *nodes.Error
	if _, err := c.CancelPull(ctx, n, "u", opsv1.CancelCodeDeleted, "why"); !errors.As(err, &nodeError) ||
		nodeError.Code() != codes.NotFound || nodeError.Silent || nodeError.Refused() {
		t.Errorf("CancelPull: %v", err)
	}
	for _, tt := range []struct {
		name  string
		until int64
		heard int
	}{{"to its end", 10, 4}, {"as long as wanted", 1, 2}} {
		t.Run(tt.name, func(t *testing.T) {
			heard := 0
			err := c.WatchPull(ctx, n, "u", func(op *opsv1.PullOperation) bool {
				heard++
				return op.GetBytesDone() < tt.until
			})
			if err != nil || heard != tt.heard {
				t.Errorf("heard %d times, want %d; error %v", heard, tt.heard, err)
			}
		})
	}
}

// A node where nothing listens can be told from one that is not there.
func TestConnectionRefused(t *testing.T) {
	ca := fleet.NewCA(t)
	c := newClient(t, ca.Issue("cri-controller"))
	nobody := address.Reserve(t)
	var nodeError *nodes.Error
	if _, err := c.ListPulls(t.Context(), nodes.Node{Name: "n", Address: nobody}); !errors.As(err, &nodeError) ||
		!nodeError.Refused() {
		t.Errorf("error %v", err)
	}
	if err := c.WatchPull(t.Context(), nodes.Node{Name: "n", Address: nobody}, "u",
		func(*opsv1.PullOperation) bool { return true }); !errors.As(err, &nodeError) || !nodeError.Refused() {
		t.Errorf("error %v", err)
	}
}
