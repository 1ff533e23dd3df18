// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

var appSlot = view.Slot{PodUID: podUID, Container: "app"}

func someOverride() *store.Override {
	return &store.Override{
		PodUID: podUID, Namespace: "default", Pod: "shop", Container: "app", Image: "app:debug",
		ImageID: "sha256:debug", SpecImage: "app:v1",
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

// TestOverridesOfPodsThatAreGone has a pod whose sandbox is removed, one with a second sandbox, and
// one that never had any.
func TestOverridesOfPodsThatAreGone(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	old, err := n.kubelet.RunPodSandbox(t.Context(),
		&runtimeapi.RunPodSandboxRequest{
			Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Uid: podUID}}})
	if err != nil {
		t.Fatal(err)
	}
	none := someOverride()
	none.PodUID = "none"
	o := n.engine.Overrides()
	o.Set(appSlot, someOverride())
	o.Set(none.Slot(), none)
	remove := func(id string) {
		if _, err := n.kubelet.RemovePodSandbox(t.Context(),
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Fatal(err)
		}
	}
	remove(old.GetPodSandboxId())
	eventually(t, func() bool { return o.Of(none.Slot()) == nil })
	if o.Of(appSlot) == nil {
		t.Error("the pod has a sandbox and its override is gone")
	}
	remove(n.sandbox)
	eventually(t, func() bool { return !o.Any() })
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(waitLong); !cond(); time.Sleep(time.Millisecond) { // polling goroutines of the engine
		if time.Now().After(end) {
			t.Fatal("it did not come to that")
		}
	}
}

func TestRestartWithImageIsRefused(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	for name, tc := range map[string]struct {
		c    *opsv1.ContainerRestart
		code codes.Code
		text string
	}{
		"both": {&opsv1.ContainerRestart{Image: "a", RevertImage: true}, codes.InvalidArgument,
			"exclude each other"},
		"long": {&opsv1.ContainerRestart{Image: strings.Repeat("a", ops.MaxImage+1)}, codes.InvalidArgument,
			"longer than"},
		"policy":  {&opsv1.ContainerRestart{Image: "a", PullPolicy: 99}, codes.InvalidArgument, "unknown pull policy"},
		"no pull": {&opsv1.ContainerRestart{Image: "a"}, codes.FailedPrecondition, "this node pulls no images"},
	} {
		tc.c.Name = "app"
		_, err := n.api.Restart(t.Context(), &opsv1.RestartRequest{Uid: "op-" + strings.ReplaceAll(name, " ", ""),
			Pod: podRef(), Containers: []*opsv1.ContainerRestart{tc.c}})
		if status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCredentialsOfRestartAreNotKept looks for them in the journal and in what is compared.
func TestCredentialsOfRestartAreNotKept(t *testing.T) {
	e, err := openEngine(t.TempDir(), view.New())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	request := func(password string) *opsv1.RestartRequest {
		return &opsv1.RestartRequest{
			Uid: "op", Pod: podRef(), Containers: []*opsv1.ContainerRestart{{Name: "app", Image: "app:debug"}},
			Credentials: []*opsv1.RegistryCredential{{Match: "r.io", Username: "u", Password: password}},
		}
	}
	o, err := e.Submit(operation.RestartCommand(request("hunter2"), nil), podRef())
	if err != nil {
		t.Fatal(err)
	}
	image := o.Snapshot().GetContainers()[0].GetImage()
	if c, _, _ := o.Credentials(); len(c) != 1 || c[0].GetPassword() != "hunter2" || image != "app:debug" {
		t.Errorf("operation: %v, credentials %v", o.Snapshot(), c)
	}
	again := request("secret2")
	if err := o.Repeat(operation.RestartCommand(again, nil)); err != nil {
		t.Fatal(err)
	}
	if c, _, _ := o.Credentials(); c[0].GetPassword() != "secret2" {
		t.Errorf("credentials: %v", c)
	}
	err = e.disk.Journal.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOperations).ForEach(func(_, v []byte) error {
			r, err := store.DecodeRecord(v)
			if err != nil {
				return err
			}
			if s := string(v) + string(r.Operation) + string(r.Request); strings.Contains(s, "hunter2") ||
				strings.Contains(s, "secret2") {
				t.Errorf("in the journal: %q", s)
			}
			return nil
		})
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNonRootByImage(t *testing.T) {
	for _, tc := range []struct {
		name     string
		uid      *runtimeapi.Int64Value // of the container
		username string
		image    *runtimeapi.Image
		want     bool
	}{
		{name: "number of the image", uid: uid(1), image: &runtimeapi.Image{Uid: uid(1)}, want: true},
		{name: "name of the image", username: "www", image: &runtimeapi.Image{Username: "www"}, want: true},
		{name: "root by name", username: "root", image: &runtimeapi.Image{Username: "root"}},
		{name: "root", uid: uid(0), image: &runtimeapi.Image{}},
		{name: "of the pod", uid: uid(2), image: &runtimeapi.Image{Uid: uid(1)}},
		{name: "image unknown", uid: uid(1)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Linux: &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: tc.uid,
					RunAsUsername: tc.username},
			}}
			if got := criclone.NonRootByImage(c, tc.image); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
