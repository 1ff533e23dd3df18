// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagechange_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/imagechange"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// fakeImages has images by name, and pulls any other, or fails to.
type fakeImages struct {
	runtimeapi.ImageServiceClient
	has   map[string]string // IDs
	fails bool
	pulls []*opsv1.PullRequest
}

func (f *fakeImages) ImageStatus(
	_ context.Context, r *runtimeapi.ImageStatusRequest, _ ...grpc.CallOption,
) (*runtimeapi.ImageStatusResponse, error) {
	id := f.has[r.GetImage().GetImage()]
	if id == "" {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: id}}, nil
}

func (f *fakeImages) Ensure(
	_ context.Context, r *opsv1.PullRequest, each func(*opsv1.PullOperation),
) (*opsv1.PullOperation, error) {
	f.pulls = append(f.pulls, r)
	each(&opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FETCHING, BytesDone: 1, Image: r.GetImage()})
	if f.fails {
		return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FAILED, Reason: "NotFound", Message: "no such tag"}, nil
	}
	f.has[r.GetImage()] = "id of " + r.GetImage()
	return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, nil
}

func (f *fakeImages) Pin(context.Context, string, string, time.Time) error { return nil }

// node is a node with these images.
func node(t *testing.T, images *fakeImages) (*imagechange.Node, *store.Store) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	dir := t.TempDir()
	journal, err := store.OpenJournal(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	records, err := store.OpenRecords(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(journal.Close(), records.Close()); err != nil {
			t.Error(err)
		}
	})
	overrides, err := store.OpenOverrides(journal, images, log)
	if err != nil {
		t.Fatal(err)
	}
	n := &imagechange.Node{Runtime: &crinode.Client{Log: log}, Service: images, Puller: images, Overrides: overrides}
	return n, &store.Store{Journal: journal, Records: records, Overrides: overrides, Boot: "boot"}
}

// change is that of an accepted operation on app.
func change(
	t *testing.T, n *imagechange.Node, disk *store.Store, c operation.Command,
) (*imagechange.Change, *operation.Operation) {
	t.Helper()
	o := operation.New(c, &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: "uid"}, disk)
	if err := o.Accept(); err != nil {
		t.Fatal(err)
	}
	return n.Of(imagechange.Container{
		Operation: o, Log: n.Runtime.Log, Warn: n.Runtime.Log.Warnf, Failpoint: func(string) {},
	}), o
}

func upgrade(policy opsv1.PullPolicy) operation.Command {
	return operation.UpgradeCommand(&opsv1.PrepareUpgradeRequest{
		Uid: "op", Owner: "owner",
		Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: "app:v2", PullPolicy: policy}},
	}, nil)
}

func restart(c *opsv1.ContainerRestart) operation.Command {
	c.Name = "app"
	return operation.RestartCommand(&opsv1.RestartRequest{
		Uid: "op", Requester: "somebody", Containers: []*opsv1.ContainerRestart{c},
	}, nil)
}

// An image is pulled as its policy says, and pinned for whoever asked.
func TestPull(t *testing.T) {
	const always, never = opsv1.PullPolicy_PULL_POLICY_ALWAYS, opsv1.PullPolicy_PULL_POLICY_NEVER
	for _, tt := range []struct {
		name   string
		has    string
		fails  bool
		c      operation.Command
		owner  string // of the pull; empty for none
		reason string
	}{
		{name: "an upgrade", c: upgrade(0), owner: "owner"},
		{name: "always", has: "app:v2", c: upgrade(always), owner: "owner"},
		{name: "never", has: "app:v2", c: upgrade(never)},
		{name: "never, and not there", c: upgrade(never), reason: opsv1.ReasonErrImageNeverPull},
		{name: "fails", c: upgrade(0), fails: true, owner: "owner", reason: opsv1.ReasonPullFailed},
		{name: "a restart", c: restart(&opsv1.ContainerRestart{Image: "app:v2"}), owner: "somebody"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			images := &fakeImages{has: map[string]string{tt.has: "there"}, fails: tt.fails}
			n, disk := node(t, images)
			ch, o := change(t, n, disk, tt.c)
			err := ch.Pull(t.Context())
			var out *operation.Outcome
			if errors.As(err, &out) != (tt.reason != "") || out != nil && out.Reason != tt.reason ||
				out == nil && err != nil {
				t.Errorf("got %v, want %q", err, tt.reason)
			}
			owner := ""
			for _, p := range images.pulls {
				owner = p.GetOwner()
				if p.GetPinFor().AsDuration() != 24*time.Hour ||
					!strings.HasPrefix(p.GetUid(), strings.ToLower(o.Kind())+"-") {
					t.Errorf("pull %v", p)
				}
			}
			if owner != tt.owner {
				t.Errorf("pulled for %q, want %q", owner, tt.owner)
			}
			if told := o.Snapshot().GetContainers()[0].GetPull(); (told != nil) != (tt.owner != "") ||
				told.GetImage() != "" {
				t.Errorf("told of the pull: %v", told)
			}
		})
	}
}

// A restart that keeps its image pins nothing.
func TestEnsureSpec(t *testing.T) {
	images := &fakeImages{has: map[string]string{}}
	n, disk := node(t, images)
	ch, _ := change(t, n, disk, restart(&opsv1.ContainerRestart{}))
	for range 2 { // the second finds it
		if err := ch.EnsureSpec(t.Context(), &opsv1.ContainerUpgrade{Name: "app", Image: "app:v1"}); err != nil {
			t.Error(err)
		}
	}
	if len(images.pulls) != 1 || images.pulls[0].GetPinFor() != nil || ch.Changes() {
		t.Errorf("pulls %v", images.pulls)
	}
}

// Only a restart with another image changes the override of its slot, and takes that back.
func TestKeep(t *testing.T) {
	slot := view.Slot{PodUID: "uid", Container: "app"}
	override := func(image string) *store.Override {
		return &store.Override{PodUID: slot.PodUID, Container: slot.Container, Image: image, SpecImage: "app:v1"}
	}
	for _, tt := range []struct {
		name   string
		c      operation.Command
		kept   string // image
		before *store.Override
		plan   *store.Override
	}{
		{name: "an upgrade", c: upgrade(0), before: override("app:old"), plan: override("app:v2"), kept: "app:old"},
		{name: "a plain restart", c: restart(&opsv1.ContainerRestart{}), before: override("app:old"), kept: "app:old"},
		{name: "another image", c: restart(&opsv1.ContainerRestart{Image: "app:v2"}),
			plan: override("app:v2"), kept: "app:v2"},
		{name: "back", c: restart(&opsv1.ContainerRestart{RevertImage: true}), before: override("app:old")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, disk := node(t, &fakeImages{has: map[string]string{}})
			n.Overrides.Set(slot, tt.before)
			ch, o := change(t, n, disk, tt.c)
			o.Container(0).Set(func(rec *store.Container, _ *opsv1.ContainerOperation) { rec.Override = tt.plan })
			image := func() string {
				if now := n.Overrides.Of(slot); now != nil {
					return now.Image
				}
				return ""
			}
			ch.Keep()
			ch.Keep() // once
			if got := image(); got != tt.kept {
				t.Errorf("kept %q, want %q", got, tt.kept)
			}
			ch.Undo()
			ch.Undo()
			if want := tt.before; image() != "" && want == nil || want != nil && image() != want.Image {
				t.Errorf("undone to %q", image())
			}
		})
	}
}
