// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"fmt"
	"io"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// overrides is one override of the slot, with any image.
type overrides struct {
	image   string // empty: none
	err     error
	applied int
	removed int
}

func (o *overrides) Any() bool       { return o.image != "" || o.err != nil }
func (o *overrides) SandboxRemoved() { o.removed++ }
func (o *overrides) Apply(
	_ context.Context, s view.Slot, req *runtimeapi.CreateContainerRequest,
) (bool, error) {
	o.applied++
	if o.err != nil || s != slot || o.image == "" {
		return false, o.err
	}
	req.Config.Image.Image = o.image
	return true, nil
}

func newBedWith(t testing.TB, o *overrides) *bed {
	b := newBed(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	b.director = interceptors.New(interceptors.Options{View: b.view, Records: b.records, Log: log, Overrides: o})
	return b
}

// createIn asks for a container of app, or another one, and returns what the runtime is asked for.
func (b *bed) createIn(container string) (asked *runtimeapi.CreateContainerRequest, err error) {
	b.t.Helper()
	b.on(methodCreate, func(_ context.Context, raw []byte) (proto.Message, error) {
		asked = &runtimeapi.CreateContainerRequest{}
		return &runtimeapi.CreateContainerResponse{ContainerId: "made"}, proto.Unmarshal(raw, asked)
	})
	_, err = call[runtimeapi.CreateContainerResponse](b.t.Context(), b, methodCreate,
		&runtimeapi.CreateContainerRequest{
			PodSandboxId: sandbox,
			Config: &runtimeapi.ContainerConfig{
				Labels: labels(container),
				Image:  &runtimeapi.ImageSpec{Image: "sha256:spec", UserSpecifiedImage: "app:v1"},
				Envs:   []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff, 0xfe}}},
			},
		})
	return asked, err
}

func TestCreateContainerWithOverride(t *testing.T) {
	t.Run("applied and recorded", func(t *testing.T) {
		b := newBedWith(t, &overrides{image: "sha256:other-and-longer"})
		asked, err := b.createIn("app")
		if err != nil || asked.GetConfig().GetImage().GetImage() != "sha256:other-and-longer" ||
			string(asked.GetConfig().GetEnvs()[0].GetValue()) != "\xff\xfe" {
			t.Errorf("%v, %v", asked, err)
		}
		if got, want := b.records.String(), fmt.Sprintf("created made %d bytes", proto.Size(asked)); got != want {
			t.Errorf("records: %s, want %s", got, want)
		}
	})
	t.Run("another slot", func(t *testing.T) {
		o := &overrides{image: "sha256:other"}
		asked, err := newBedWith(t, o).createIn("web")
		if err != nil || asked.GetConfig().GetImage().GetImage() != "sha256:spec" || o.applied != 1 {
			t.Errorf("%v, %v", asked, err)
		}
	})
	t.Run("none", func(t *testing.T) {
		o := &overrides{}
		asked, err := newBedWith(t, o).createIn("app")
		if err != nil || asked.GetConfig().GetImage().GetImage() != "sha256:spec" || o.applied != 0 {
			t.Errorf("%v, %v, asked %d times", asked, err, o.applied)
		}
	})
	t.Run("the runtime is away", func(t *testing.T) {
		b := newBedWith(t, &overrides{err: status.Error(codes.Unavailable, "away")})
		asked, err := b.createIn("app")
		wantCode(t, err, codes.Unavailable)
		if asked != nil || b.view.Claimed(slot) {
			t.Errorf("asked %v", asked)
		}
	})
}

func TestRemovePodSandboxWithOverride(t *testing.T) {
	for _, tc := range []struct {
		name   string
		image  string
		err    error
		notify int
	}{
		{"none", "", nil, 0},
		{"one", "sha256:other", nil, 1},
		{"refused", "sha256:other", status.Error(codes.Unknown, "busy"), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := &overrides{image: tc.image}
			b := newBedWith(t, o)
			b.on(methodRemoveSandbox, always(&runtimeapi.RemovePodSandboxResponse{}, tc.err))
			_, err := call[runtimeapi.RemovePodSandboxResponse](
				t.Context(), b, methodRemoveSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox},
			)
			if status.Code(err) != status.Code(tc.err) || o.removed != tc.notify {
				t.Errorf("%v, told %d times", err, o.removed)
			}
		})
	}
}
