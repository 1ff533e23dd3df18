// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"testing"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
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

func TestImageFits(t *testing.T) {
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
		{name: "entrypoint of the image", status: tellsAll(t, some, &imagespec.Image{Platform: ours, Config: imagespec.ImageConfig{Entrypoint: []string{"/app"}}})},
		{name: "command of the pod", status: tellsAll(t, some, empty), config: &runtimeapi.ContainerConfig{Command: []string{"/app"}}},
		{name: "arguments of the pod", status: tellsAll(t, some, empty), config: &runtimeapi.ContainerConfig{Args: []string{"/app"}}},
		{name: "nothing to run", status: tellsAll(t, some, empty), err: "there is nothing to run"},
		{name: "not there", status: &runtimeapi.ImageStatusResponse{}, err: "is not on the node"},
		{name: "a runtime that tells nothing", status: &runtimeapi.ImageStatusResponse{Image: some}},
		{name: "a runtime that tells something else", status: &runtimeapi.ImageStatusResponse{Image: some, Info: map[string]string{"info": "no JSON"}}},
		{name: "no platform", status: tellsAll(t, some, &imagespec.Image{Config: runs.Config})},
		{name: "variant", status: tellsAll(t, some, &imagespec.Image{Platform: imagespec.Platform{OS: ours.OS, Architecture: ours.Architecture, Variant: "v99"}, Config: runs.Config})},
		{
			name:   "another architecture",
			status: tellsAll(t, some, &imagespec.Image{Platform: imagespec.Platform{OS: ours.OS, Architecture: "s390x"}, Config: runs.Config}),
			err:    "is for " + ours.OS + "/s390x, this node is " + ours.OS + "/" + ours.Architecture,
		},
		{
			name:   "another system",
			status: tellsAll(t, some, &imagespec.Image{Platform: imagespec.Platform{OS: "windows", Architecture: ours.Architecture}, Config: runs.Config}),
			err:    "is for windows/",
		},
		{name: "root", status: tellsAll(t, some, runs), want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}, err: "has runAsNonRoot and image app:v2 will run as root"},
		{
			name: "root by number", status: tellsAll(t, &runtimeapi.Image{Uid: uid(0)}, runs),
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}, err: "will run as root",
		},
		{name: "root without runAsNonRoot", status: tellsAll(t, &runtimeapi.Image{Uid: uid(0)}, runs), want: &opsv1.ContainerUpgrade{}},
		{name: "not root", status: tellsAll(t, &runtimeapi.Image{Uid: uid(1000)}, runs), want: &opsv1.ContainerUpgrade{RunAsNonRoot: true}},
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
			want: &opsv1.ContainerUpgrade{RunAsNonRoot: true, RunAsUser: proto.Int64(0)}, err: "runAsUser breaks non-root policy",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.want
			if want == nil {
				want = &opsv1.ContainerUpgrade{}
			}
			want.Name, want.Image = "app", "app:v2"
			err := imageFits(tt.status, &runtimeapi.CreateContainerRequest{Config: tt.config}, want)
			if tt.err == "" {
				if err != nil {
					t.Fatalf("imageFits: %v, want nil", err)
				}
				return
			}
			var out *outcome
			if !errors.As(err, &out) || out.reason != ReasonImageUnfit || !strings.Contains(out.message, tt.err) {
				t.Fatalf("imageFits: %v, want an outcome with %q", err, tt.err)
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
		{name: "number to number", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)}, after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(2)},
		{name: "number to name", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)}, after: &runtimeapi.Image{Username: "www"}, wantName: "www"},
		{name: "name to number", username: "www", before: &runtimeapi.Image{Username: "www"}, after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(2)},
		{name: "name to none", username: "www", before: &runtimeapi.Image{Username: "www"}, after: &runtimeapi.Image{}, wantUID: uid(0)},
		{name: "none to number", uid: uid(0), before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(2)},
		{name: "the same", uid: uid(1), before: &runtimeapi.Image{Uid: uid(1)}, after: &runtimeapi.Image{Uid: uid(1)}, wantUID: uid(1)},
		{name: "the pod's", uid: uid(1), before: &runtimeapi.Image{Uid: uid(3)}, after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(1)},
		{name: "the pod's, and the image has a name", uid: uid(0), before: &runtimeapi.Image{Username: "www"}, after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(0)},
		{name: "no old image", uid: uid(0), after: &runtimeapi.Image{Uid: uid(2)}, wantUID: uid(0)},
		{name: "no user", before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}},
		{name: "no security context", noContext: true, before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}},
		{name: "not Linux", noLinux: true, before: &runtimeapi.Image{}, after: &runtimeapi.Image{Uid: uid(2)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Linux: &runtimeapi.LinuxContainerConfig{
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: tt.uid, RunAsUsername: tt.username},
			}}
			if tt.noContext {
				c.Linux.SecurityContext = nil
			}
			if tt.noLinux {
				c.Linux = nil
			}
			adoptImageUser(c, tt.before, tt.after)
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

// A restart whose tag has moved treats the image's user as kubelet would, if who commands it knows the pod; else it goes by the container.
func TestRestartWithAnotherImageUser(t *testing.T) {
	user := func(n int64) *int64 { return &n }
	for _, tc := range []struct {
		name       string
		runs       int64 // user of the container and of the image that it runs
		now        int64 // user of the image by now
		blind      bool  // the command has no environment
		nonRoot    bool
		user       *int64
		want, says string
		wantUser   int64
	}{
		{name: "the pod names none", runs: 1, now: 2, want: succeeded, wantUser: 2},
		{name: "the pod names that of the old image", runs: 1, now: 2, user: user(1), want: succeeded, wantUser: 1},
		{name: "to root, which the pod allows", runs: 1, now: 0, want: succeeded, wantUser: 0},
		{name: "to root, which the pod does not allow", runs: 1, now: 0, nonRoot: true, want: "FAILED, app FAILED ImageUnfit", says: "will run as root"},
		{name: "to root, but the pod names another", runs: 1, now: 0, nonRoot: true, user: user(1), want: succeeded, wantUser: 1},
		{name: "nothing is known of the pod", runs: 1, now: 2, blind: true, want: succeeded, wantUser: 2},
		{name: "nothing is known of the pod, to root", runs: 1, now: 0, blind: true, want: "FAILED, app FAILED ImageUnfit", says: "cannot tell"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t, podOptions{})
			images := newFakeImages()
			images.images["sha256:app:v1"] = &runtimeapi.Image{Id: "sha256:app:v1", Uid: uid(tc.runs)}
			images.images["app:v1"] = &runtimeapi.Image{Id: "sha256:moved", Uid: uid(tc.now)}
			n.engine.images, n.engine.img = images, images
			c := n.containerConfig("app", 0)
			c.Image = &runtimeapi.ImageSpec{Image: "sha256:app:v1", UserSpecifiedImage: "app:v1"}
			c.Linux.SecurityContext.RunAsUser = uid(tc.runs)
			b, err := proto.Marshal(&runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: c, SandboxConfig: n.sandboxConfig()})
			n.must(err)
			n.engine.records.Created(n.rt.idOf(t, "app/0"), b)
			n.runTidied()
			n.restart("op", func(r *opsv1.RestartRequest) {
				if !tc.blind {
					r.Containers[0].Environment = environmentOf(1)
				}
				r.Containers[0].RunAsNonRoot, r.Containers[0].RunAsUser = tc.nonRoot, tc.user
			})
			op := n.finish("op")
			if got := verdict(op); got != tc.want || !strings.Contains(op.GetMessage(), tc.says) {
				t.Fatalf("operation ended %s (%s), want %s (%s)", got, op.GetMessage(), tc.want, tc.says)
			}
			if tc.want != succeeded {
				return
			}
			next := n.engine.records.request(n.rt.idOf(t, "app/1")).GetConfig()
			if got := next.GetLinux().GetSecurityContext().GetRunAsUser(); !proto.Equal(got, uid(tc.wantUser)) || next.GetImage().GetImage() != "sha256:moved" {
				t.Errorf("image %s with user %v, want %d", next.GetImage().GetImage(), got, tc.wantUser)
			}
		})
	}
}
