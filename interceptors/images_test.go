// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"io"
	"slices"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
)

// unclaimed are the images with these IDs.
type unclaimed map[string]bool

func (u unclaimed) AnyUnclaimed() bool                 { return len(u) > 0 }
func (u unclaimed) Unclaimed(i *runtimeapi.Image) bool { return u[i.GetId()] }
func (u unclaimed) Claimed(id string)                  { delete(u, id) }
func (u unclaimed) KubeletPulls(string) func()         { return func() {} }

// TestImageStatus: an image that kubelet has not pulled is not there for it; when it has, nothing
// is decoded any more.
func TestImageStatus(t *testing.T) {
	const (
		status = runtimeapi.ImageService_ImageStatus_FullMethodName
		pull   = runtimeapi.ImageService_PullImage_FullMethodName
	)
	b := newBed(t)
	images := unclaimed{"sha256:1": true}
	log := logrus.New()
	log.SetOutput(io.Discard)
	b.director = interceptors.New(
		interceptors.Options{View: b.view, Records: b.records, Log: log, Pulls: images, Images: images},
	)
	shown := func(id string) bool {
		t.Helper()
		b.on(
			status,
			always(
				&runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: id},
					Info: map[string]string{"info": "{}"}}, nil,
			),
		)
		raw, err := b.director.Unary(status)(t.Context(), status, nil, b.next(status))
		if err != nil {
			t.Fatal(err)
		}
		var resp runtimeapi.ImageStatusResponse
		if err := proto.Unmarshal(raw, &resp); err != nil {
			t.Fatal(err)
		}
		if (resp.GetImage() != nil) != (len(resp.GetInfo()) > 0) {
			t.Errorf("half an answer: %v", &resp)
		}
		return resp.GetImage() != nil
	}
	if shown("sha256:1") || !shown("sha256:2") {
		t.Error("not the image that kubelet has not pulled, or others too")
	}
	b.on(pull, always(&runtimeapi.PullImageResponse{ImageRef: "sha256:1"}, nil))
	if _, err := b.director.Unary(pull)(t.Context(), pull, nil, b.next(pull)); err != nil {
		t.Fatal(err)
	}
	if b.director.Unary(status) != nil {
		t.Error("it is looked at for nothing")
	}
}

// told is what pre-pulls are told of kubelet's.
type told []string

func (l *told) KubeletPulls(image string) func() {
	*l = append(*l, "pulls "+image)
	return func() { *l = append(*l, "done") }
}

// TestPullImage: pre-pulls are told which image kubelet pulls, and what is no request is
// the runtime's to refuse.
func TestPullImage(t *testing.T) {
	const pull = runtimeapi.ImageService_PullImage_FullMethodName
	raw, err := proto.Marshal(
		&runtimeapi.PullImageRequest{
			Image: &runtimeapi.ImageSpec{Image: "nginx:1"}, Auth: &runtimeapi.AuthConfig{Password: "secret"},
		},
	)
	if err != nil {
		t.Fatal(err)
	}
	refused := status.Error(codes.Internal, "no")
	for _, tt := range []struct {
		name string
		raw  []byte
		err  error
		want []string
	}{
		{"pulled", raw, nil, []string{"pulls nginx:1", "done"}},
		{"refused", raw, refused, []string{"pulls nginx:1", "done"}},
		{"without an image", nil, nil, []string{"pulls ", "done"}},
		{"no request", []byte{0xff}, refused, []string{"pulls ", "done"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			log := logrus.New()
			log.SetOutput(io.Discard)
			var l told
			d := interceptors.New(interceptors.Options{View: b.view, Records: b.records, Log: log, Pulls: &l})
			b.on(pull, always(&runtimeapi.PullImageResponse{ImageRef: "sha256:1"}, tt.err))
			if _, err := d.Unary(pull)(t.Context(), pull, tt.raw, b.next(pull)); status.Code(err) != status.Code(
				tt.err) {
				t.Error(err)
			}
			if !slices.Equal(l, tt.want) {
				t.Errorf("told %q, want %q", l, tt.want)
			}
		})
	}
}
