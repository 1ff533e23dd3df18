// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"context"
	"errors"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

var appSlot = view.Slot{PodUID: podUID, Container: "app"}

func someOverride() *store.Override {
	return &store.Override{
		PodUID: podUID, Namespace: "default", Pod: "shop", Container: "app",
		Image: "app:debug", ImageID: "sha256:debug", SpecImage: "app:v1",
		Since: time.Unix(1000, 0).UTC(), Requester: "test", Operation: "op",
	}
}

// nodeImages is what the node has of images, by name and ID.
type nodeImages struct {
	runtimeapi.ImageServiceClient
	images map[string]*runtimeapi.Image
	err    error
}

func (n *nodeImages) ImageStatus(
	_ context.Context, r *runtimeapi.ImageStatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.ImageStatusResponse, error) {
	if n.err != nil {
		return nil, n.err
	}
	return &runtimeapi.ImageStatusResponse{Image: n.images[r.GetImage().GetImage()]}, nil
}

func overridesIn(t *testing.T, dir string, img runtimeapi.ImageServiceClient) *store.Overrides {
	t.Helper()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := store.OpenOverrides(j, img, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOverrideApply(t *testing.T) {
	uid := func(n int64) *runtimeapi.Image { return &runtimeapi.Image{Uid: &runtimeapi.Int64Value{Value: n}} }
	for _, tc := range []struct {
		name           string
		spec, debug    *runtimeapi.Image // nil: not on the node
		err            error
		asked          string // by the spec
		user, want     int64
		container      string
		applied, keeps bool
		code           codes.Code
	}{
		{name: "root", spec: uid(0), debug: uid(0), applied: true, keeps: true},
		{name: "user of the image", spec: uid(1000), debug: uid(2000), user: 1000, want: 2000, applied: true,
			keeps: true},
		{name: "user of the pod", spec: uid(1000), debug: uid(2000), user: 3000, want: 3000, applied: true,
			keeps: true},
		{name: "the spec's image is not to be had", debug: uid(2000), user: 1000, want: 1000, applied: true,
			keeps: true},
		{name: "image gone", spec: uid(1000), user: 1000, want: 1000},
		{name: "patched", spec: uid(1000), debug: uid(2000), asked: "app:v2", user: 1000, want: 1000},
		{
			name: "the runtime is away", err: status.Error(codes.Unavailable, "away"),
			user: 1000, want: 1000, keeps: true, code: codes.Unavailable,
		},
		{name: "the runtime refuses", err: status.Error(codes.Unknown, "no"), user: 1000, want: 1000},
		{name: "another container", container: "web", user: 1000, want: 1000, keeps: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			images := map[string]*runtimeapi.Image{}
			for id, image := range map[string]*runtimeapi.Image{"sha256:spec": tc.spec, "sha256:debug": tc.debug} {
				if image != nil {
					image.Id = id
					images[id] = image
				}
			}
			s := overridesIn(t, t.TempDir(), &nodeImages{images: images, err: tc.err})
			s.Set(appSlot, someOverride())
			if tc.asked == "" {
				tc.asked = "app:v1"
			}
			if tc.container == "" {
				tc.container = "app"
			}
			req := &runtimeapi.CreateContainerRequest{Config: &runtimeapi.ContainerConfig{
				Image:       &runtimeapi.ImageSpec{Image: "sha256:spec", UserSpecifiedImage: tc.asked},
				Annotations: map[string]string{"io.kubernetes.container.hash": "abc"},
				Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					RunAsUser: &runtimeapi.Int64Value{Value: tc.user},
				}},
			}}
			want := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
			want.Config.Linux.SecurityContext.RunAsUser.Value = tc.want
			if tc.applied {
				want.Config.Image = &runtimeapi.ImageSpec{Image: "sha256:debug", UserSpecifiedImage: "app:debug"}
			}
			applied, err := s.Apply(t.Context(), view.Slot{PodUID: podUID, Container: tc.container}, req)
			if applied != tc.applied || status.Code(err) != tc.code {
				t.Errorf("applied: %v, %v", applied, err)
			}
			if !proto.Equal(req, want) {
				t.Errorf("got  %v\nwant %v", req, want)
			}
			if keeps := s.Of(appSlot) != nil; keeps != tc.keeps || s.Any() != tc.keeps {
				t.Errorf("keeps the override: %v", keeps)
			}
		})
	}
}

// TestOverridesOnDisk opens them anew.
func TestOverridesOnDisk(t *testing.T) {
	dir := t.TempDir()
	j, err := store.OpenJournal(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.OpenOverrides(j, nil, quiet())
	if err != nil {
		t.Fatal(err)
	}
	web := someOverride()
	web.Container = "web"
	s.Set(appSlot, someOverride())
	s.Set(web.Slot(), web)
	if err := s.Write(func(map[string][]byte) error { return errors.New("disk full") }); err == nil {
		t.Error("written to a full disk")
	}
	s.Drop(web) // which writes the other one too
	err = j.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("overrides")).Put([]byte("bad"), []byte("{"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	again := overridesIn(t, dir, nil)
	if got := again.List(); len(got) != 1 || *got[0] != *someOverride() || !again.Any() {
		t.Errorf("overrides: %+v", got)
	}
	if err := again.Write(func(changes map[string][]byte) error {
		if len(changes) != 0 {
			t.Errorf("unwritten: %v", changes)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestSpecImage(t *testing.T) {
	o := someOverride()
	for _, tc := range []struct {
		name, runs, want string
		o                *store.Override
	}{
		{"none", "app:v1", "app:v1", nil},
		{"overridden", "app:debug", "app:v1", o},
		{"made without the proxy", "app:v1", "app:v1", o},
		{"patched without the proxy", "app:v2", "app:v2", o},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.o.SpecImageOf(tc.runs); got != tc.want {
				t.Errorf("got %s", got)
			}
		})
	}
}
