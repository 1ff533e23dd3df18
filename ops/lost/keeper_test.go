// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/lost"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/switchover"
)

// fakeRuntime has the containers of one slot. Their states do not change.
type fakeRuntime struct {
	runtimeapi.RuntimeServiceClient
	containers []*runtimeapi.Container
}

func (f *fakeRuntime) ListContainers(
	context.Context, *runtimeapi.ListContainersRequest, ...grpc.CallOption,
) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: slices.Clone(f.containers)}, nil
}

func (f *fakeRuntime) ContainerStatus(
	_ context.Context, r *runtimeapi.ContainerStatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.ContainerStatusResponse, error) {
	for _, c := range f.containers {
		if c.GetId() == r.GetContainerId() {
			return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: c.GetId(),
					State: c.GetState()}},
				nil
		}
	}
	return nil, status.Error(codes.NotFound, "no such container")
}

func (f *fakeRuntime) RemoveContainer(
	_ context.Context, r *runtimeapi.RemoveContainerRequest, _ ...grpc.CallOption,
) (*runtimeapi.RemoveContainerResponse, error) {
	f.containers = slices.DeleteFunc(f.containers,
		func(c *runtimeapi.Container) bool { return c.GetId() == r.GetContainerId() })
	return &runtimeapi.RemoveContainerResponse{}, nil
}

var slot = view.Slot{PodUID: "uid", Container: "app"}

// container has the token, or none, and is as old as its place in the list says.
func container(id, token string, state runtimeapi.ContainerState, made int64) *runtimeapi.Container {
	return &runtimeapi.Container{
		Id: id, PodSandboxId: "sandbox", State: state, CreatedAt: made,
		Labels:      map[string]string{criclone.LabelPodUID: slot.PodUID, criclone.LabelContainer: slot.Container},
		Annotations: map[string]string{view.StagedAnnotation: token},
	}
}

func newKeeper(t *testing.T, rt *fakeRuntime) (*lost.Keeper, *view.View) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	dir := t.TempDir()
	records, err := store.OpenRecords(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := records.Close(); err != nil {
			t.Error(err)
		}
	})
	v := view.New()
	return lost.New(lost.Options{
		Node: &crinode.Client{Runtime: rt, Log: log}, View: v, Records: records, Tokens: lost.NewTokens(), Log: log,
		Switchover: switchover.NewProber(switchover.Options{StateDir: dir, Runtime: rt, Log: log}), LogLinks: dir,
	}), v
}

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
)

// What is taken away depends on what runs in the slot, and on what the journal knows of the token.
func TestKeeperTakesStraysAway(t *testing.T) {
	for _, tt := range []struct {
		name   string
		all    []*runtimeapi.Container
		before func(k *lost.Keeper) // what the journal has
		left   []string
	}{
		{
			name: "never started", left: []string{"old"},
			all: []*runtimeapi.Container{container("old", "", running, 1), container("new", "token", created, 2)},
		},
		{
			name: "known", left: []string{"old", "new"},
			all:    []*runtimeapi.Container{container("old", "", running, 1), container("new", "token", created, 2)},
			before: func(k *lost.Keeper) { k.Tokens.Add("token") },
		},
		{
			name: "taken over", left: []string{"old", "new"},
			all: []*runtimeapi.Container{container("old", "", exited, 1), container("new", "token", running, 2)},
		},
		{
			name: "of another version", left: []string{"old", "new"},
			all:    []*runtimeapi.Container{container("old", "", running, 1), container("new", "token", created, 2)},
			before: func(k *lost.Keeper) { k.LeaveAlone([]byte(`{"token":"token"}`)) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rt := &fakeRuntime{containers: tt.all}
			k, v := newKeeper(t, rt)
			if tt.before != nil {
				tt.before(k)
			}
			if err := k.Judge(t.Context()); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			k.Clear(ctx, &wg)
			if refused := k.Refuse(slot); refused != nil {
				var out *operation.Outcome
				if !errors.As(refused, &out) || out.Reason != opsv1.ReasonJournalVersion ||
					tt.name != "of another version" {
					t.Errorf("refused: %v", refused)
				}
				cancel() // nobody wants the slot
			} else if tt.name == "of another version" {
				t.Error("not refused")
			}
			wg.Wait()
			cancel()
			var left []string
			for _, c := range rt.containers {
				left = append(left, c.GetId())
			}
			if !slices.Equal(left, tt.left) {
				t.Errorf("left are %v, want %v", left, tt.left)
			}
			if held := v.Claimed(slot); held != (tt.name == "of another version") {
				t.Errorf("the slot is held: %v", held)
			}
		})
	}
}

// A token is known from its first use until nothing can be a stray any more.
func TestTokens(t *testing.T) {
	tokens := lost.NewTokens()
	token := tokens.New()
	if len(token) != 32 || !tokens.Has(token) || tokens.Has("other") {
		t.Errorf("token %q", token)
	}
	tokens.Close()
	tokens.Add("other")
	if tokens.Has(token) || tokens.Has("other") {
		t.Error("a token is known after Close")
	}
}
