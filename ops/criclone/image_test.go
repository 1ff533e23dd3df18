// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone_test

import (
	"encoding/json"
	"runtime"
	"strings"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// tellsAll is containerd's form of a verbose image status.
func tellsAll(t *testing.T, image *runtimeapi.Image, spec *imagespec.Image) *runtimeapi.ImageStatusResponse {
	t.Helper()
	raw, err := json.Marshal(struct {
		ChainID   string           `json:"chainID"`
		ImageSpec *imagespec.Image `json:"imageSpec"`
	}{"sha256:c", spec})
	if err != nil {
		t.Fatal(err)
	}
	return &runtimeapi.ImageStatusResponse{Image: image, Info: map[string]string{"info": string(raw)}}
}

func uid(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

func TestCheckImage(t *testing.T) {
	ours := imagespec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	runs := &imagespec.Image{Platform: ours, Config: imagespec.ImageConfig{Cmd: []string{"/app"}}}
	empty := &imagespec.Image{Platform: ours}
	some := &runtimeapi.Image{Id: "sha256:b"}
	for _, tt := range []struct {
		name   string
		status *runtimeapi.ImageStatusResponse
		config *runtimeapi.ContainerConfig
		want   *opsv1.ContainerUpgrade
		err    string
	}{
		{name: "command of the image", status: tellsAll(t, some, runs)},
		{
			name: "entrypoint of the image",
			status: tellsAll(t, some, &imagespec.Image{
				Platform: ours, Config: imagespec.ImageConfig{Entrypoint: []string{"/app"}},
			}),
		},
		{
			name: "command of the pod", status: tellsAll(t, some, empty),
			config: &runtimeapi.ContainerConfig{Command: []string{"/app"}},
		},
		{
			name: "arguments of the pod", status: tellsAll(t, some, empty),
			config: &runtimeapi.ContainerConfig{Args: []string{"/app"}},
		},
		{name: "nothing to run", status: tellsAll(t, some, empty), err: "there is nothing to run"},
		{name: "not there", status: &runtimeapi.ImageStatusResponse{}, err: "is not on the node"},
		{name: "a runtime that tells nothing", status: &runtimeapi.ImageStatusResponse{Image: some}},
		{
			name:   "a runtime that tells something else",
			status: &runtimeapi.ImageStatusResponse{Image: some, Info: map[string]string{"info": "no JSON"}},
		},
		{name: "no platform", status: tellsAll(t, some, &imagespec.Image{Config: runs.Config})},
		{
			name: "variant",
			status: tellsAll(t, some, &imagespec.Image{
				Platform: imagespec.Platform{OS: ours.OS, Architecture: ours.Architecture, Variant: "v99"},
				Config:   runs.Config,
			}),
		},
		{
			name: "another architecture",
			status: tellsAll(t, some, &imagespec.Image{
				Platform: imagespec.Platform{OS: ours.OS, Architecture: "s390x"}, Config: runs.Config,
			}),
			err: "is for " + ours.OS + "/s390x, this node is " + ours.OS + "/" + ours.Architecture,
		},
		{
			name: "another system",
			status: tellsAll(t, some, &imagespec.Image{
				Platform: imagespec.Platform{OS: "windows", Architecture: ours.Architecture}, Config: runs.Config,
			}),
			err: "is for windows/",
		},
		{
			name: "root", status: tellsAll(t, some, runs), want: &opsv1.ContainerUpgrade{RunAsNonRoot: true},
			err: "has runAsNonRoot and image app:v2 will run as root",
		},
		{
			name: "root by number", status: tellsAll(t, &runtimeapi.Image{Uid: uid(0)}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}, err: "will run as root",
		},
		{
			name: "root without runAsNonRoot", status: tellsAll(t, &runtimeapi.Image{Uid: uid(0)}, runs),
			want: &opsv1.ContainerUpgrade{},
		},
		{
			name: "not root", status: tellsAll(t, &runtimeapi.Image{Uid: uid(1000)}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true},
		},
		{
			name: "a name", status: tellsAll(t, &runtimeapi.Image{Username: "www"}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}, err: "non-numeric user (www)",
		},
		{
			name: "a user beyond all", status: tellsAll(t, &runtimeapi.Image{Uid: uid(1 << 31)}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}, err: "invalid user id (2147483648)",
		},
		{
			name: "the pod's user counts", status: tellsAll(t, &runtimeapi.Image{Username: "www"}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true, RunAsUser: proto.Int64(1000)},
		},
		{
			name: "the pod's user is root", status: tellsAll(t, &runtimeapi.Image{Uid: uid(1000)}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true, RunAsUser: proto.Int64(0)},
			err:  "runAsUser breaks non-root policy",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.want
			if want == nil {
				want = &opsv1.ContainerUpgrade{}
			}
			want.Name, want.Image = "app", "app:v2"
			err := criclone.CheckImage(tt.status, &runtimeapi.CreateContainerRequest{Config: tt.config}, want)
			if tt.err == "" {
				if err != nil {
					t.Fatalf("CheckImage: %v, want nil", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("CheckImage: %v, want %q", err, tt.err)
			}
		})
	}
}

func TestAdoptImageUser(t *testing.T) {
	for _, tt := range []struct {
		name               string
		uid                *runtimeapi.Int64Value // of the request
		username           string
		before, after      *runtimeapi.Image
		wantUID            *runtimeapi.Int64Value
		wantName           string
		noContext, noLinux bool
	}{
		{
			name: "number to number", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)},
			after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(2),
		},
		{
			name: "number to name", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)},
			after: &runtimeapi.Image{Username: "www"}, wantName: "www",
		},
		{
			name: "name to number", username: "www", before: &runtimeapi.Image{Username: "www"},
			after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(2),
		},
		{
			name: "name to none", username: "www", before: &runtimeapi.Image{Username: "www"},
			after:   &runtimeapi.Image{},
			wantUID: uid(0),
		},
		{
			name: "none to number", uid: uid(0), before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)},
			wantUID: uid(2),
		},
		{
			name: "the same", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)},
			after:   &runtimeapi.Image{Uid: uid(1)},
			wantUID: uid(1),
		},
		{
			name: "the pod's", uid: uid(1), before: &runtimeapi.Image{Uid: uid(3)},
			after:   &runtimeapi.Image{Uid: uid(2)},
			wantUID: uid(1),
		},
		{
			name: "the pod's, and the image has a name", uid: uid(0), before: &runtimeapi.Image{Username: "www"},
			after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(0),
		},
		{name: "no old image", uid: uid(0), after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(0)},
		{name: "no user", before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}},
		{name: "no security context", noContext: true, before: &runtimeapi.Image{},
			after: &runtimeapi.Image{Uid: uid(2)}},
		{name: "not Linux", noLinux: true, before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Linux: &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: tt.uid,
					RunAsUsername: tt.username},
			}}
			if tt.noContext {
				c.Linux.SecurityContext = nil
			}
			if tt.noLinux {
				c.Linux = nil
			}
			criclone.AdoptImageUser(c, tt.before, tt.after)
			sc := c.GetLinux().GetSecurityContext()
			if !proto.Equal(sc.GetRunAsUser(), tt.wantUID) || sc.GetRunAsUsername() != tt.wantName {
				t.Errorf("user %v %q, want %v %q", sc.GetRunAsUser(), sc.GetRunAsUsername(), tt.wantUID, tt.wantName)
			}
			if tt.after != nil && tt.after.GetUid() != nil && sc.GetRunAsUser() == tt.after.GetUid() {
				t.Error("the image's message is shared")
			}
		})
	}
}
