// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestPlatform has images of one manifest, which the runtime pulls whatever they are for.
func TestPlatform(t *testing.T) {
	for _, tt := range []struct {
		name, arch string
		there      bool // before
		phase      opsv1.PullPhase
		reason     string
	}{
		{"ours", runtime.GOARCH, false, succeeded, opsv1.PullReasonPulled},
		{"not told", "", false, succeeded, opsv1.PullReasonPulled},
		{"another", "s390x", false, failed, opsv1.PullReasonInvalidImage},
		{"another, present", "s390x", true, failed, opsv1.PullReasonInvalidImage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, Options{}, func(t *testing.T, b *bubble) {
				b.rt.set(func() {
					b.rt.arch, b.rt.images["docker.io/library/nginx:latest"] = tt.arch, tt.there
					b.rt.labels = map[string]map[string]string{"sha256:docker.io/library/nginx:latest": {}}
				})
				b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx", PinFor: durationpb.New(time.Hour)})
				op := b.want("a", tt.phase, tt.reason)
				if op.GetAttempt() != 1 || len(b.listPins()) != map[bool]int{true: 1}[tt.phase == succeeded] {
					t.Errorf("pins %v, %v", b.listPins(), op)
				}
				if tt.phase == failed && !strings.Contains(op.GetMessage(), "is for "+runtime.GOOS+"/s390x, this node is "+runtime.GOOS+"/"+runtime.GOARCH) {
					t.Errorf("%v", op)
				}
				// Who waits looks at the image himself.
				if op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "b", Image: "nginx"}, nil); err != nil || op.GetPhase() != succeeded {
					t.Errorf("%v, %v", op, err)
				}
			})
		})
	}
}
