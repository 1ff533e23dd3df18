// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func uid(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

// A restart whose tag has moved treats the image's user as kubelet would, if who commands it knows
// the pod; else it goes by the container.
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
		{name: "to root, which the pod does not allow", runs: 1, now: 0, nonRoot: true,
			want: "FAILED, app FAILED ImageUnfit", says: "will run as root"},
		{name: "to root, but the pod names another", runs: 1, now: 0, nonRoot: true, user: user(1), want: succeeded,
			wantUser: 1},
		{name: "nothing is known of the pod", runs: 1, now: 2, blind: true, want: succeeded, wantUser: 2},
		{name: "nothing is known of the pod, to root", runs: 1, now: 0, blind: true,
			want: "FAILED, app FAILED ImageUnfit", says: "cannot tell"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t, podOptions{})
			images := newFakeImages()
			images.images["sha256:app:v1"] = &runtimeapi.Image{Id: "sha256:app:v1", Uid: uid(tc.runs)}
			images.images["app:v1"] = &runtimeapi.Image{Id: "sha256:moved", Uid: uid(tc.now)}
			n.engine.node.Images.Puller, n.engine.node.Images.Service = images, images
			c := n.containerConfig("app", 0)
			c.Image = &runtimeapi.ImageSpec{Image: "sha256:app:v1", UserSpecifiedImage: "app:v1"}
			c.Linux.SecurityContext.RunAsUser = uid(tc.runs)
			b, err := proto.Marshal(&runtimeapi.CreateContainerRequest{PodSandboxId: n.sandbox, Config: c,
				SandboxConfig: n.sandboxConfig()})
			n.must(err)
			n.engine.node.Records.Created(n.rt.ID(t, "app/0"), b)
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
			next := n.engine.node.Records.Request(n.rt.ID(t, "app/1")).GetConfig()
			if got := next.GetLinux().GetSecurityContext().GetRunAsUser(); !proto.Equal(got, uid(tc.wantUser)) ||
				next.GetImage().GetImage() != "sha256:moved" {
				t.Errorf("image %s with user %v, want %d", next.GetImage().GetImage(), got, tc.wantUser)
			}
		})
	}
}
