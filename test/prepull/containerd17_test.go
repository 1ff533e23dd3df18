// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// TestContainerd17 pulls on a node with the older containerd: what is asked of it beyond CRI
// (leases, the content store, labels of images) has been in both. Its configuration has version 2.
func TestContainerd17(t *testing.T) {
	otherBed(t, testbed.Options{Containerd17: true})
	conn, err := bed.DialCRI()
	must(t, err)
	defer conn.Close()
	v, err := runtimeapi.NewRuntimeServiceClient(conn).Version(t.Context(), &runtimeapi.VersionRequest{})
	must(t, err)
	if !strings.HasPrefix(strings.TrimPrefix(v.GetRuntimeVersion(), "v"), "1.7.") {
		t.Fatalf("the node runs %v", v)
	}
	for _, limit := range []int64{0, 40 * mib} {
		t.Run(fmt.Sprintf("limit of %d MiB", limit/mib), func(t *testing.T) {
			t.Run("progress and pin", func(t *testing.T) {
				f := newFront(t, "progress17.test")
				p := push(t, fmt.Sprintf("progress17-%d:1", limit), 4, 4)
				f.throttle(wire / 4)
				steps := map[int64]bool{}
				uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name), BytesPerSecond: limit, Owner: "a",
					PinFor: durationpb.New(time.Hour)})
				op := follow(t, uid, func(op *opsv1.PullOperation) bool {
					steps[op.GetBytesDone()] = true
					return finished(op)
				})
				if op.GetReason() != "Pulled" || op.GetBytesDone() != p.size || op.GetBytesTotal() != p.size ||
					len(op.GetLayers()) != 4 || len(steps) < 3 {
					t.Errorf("%v after %d steps", op, len(steps))
				}
				fetchedOnce(t, f, p)
				pinned(t, f.image(p.name), true)
				if img := present(t, f.image(p.name)); img.GetId() != op.GetImageId() {
					t.Errorf("kubelet sees %v", img)
				}
				if n := release(t, "a", ""); n != 1 {
					t.Errorf("%d released", n)
				}
				pinned(t, f.image(p.name), false)
			})
			t.Run("connections cut", func(t *testing.T) {
				f := newFront(t, "cut17.test")
				p := push(t, fmt.Sprintf("cut17-%d:1", limit), 4, 4)
				f.cutBlobs(3*mib, 3)
				succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(p.name), BytesPerSecond: limit}))
				fetchedOnce(t, f, p)
				if f.ranges.Load() < 3 {
					t.Errorf("%d requests for parts", f.ranges.Load())
				}
			})
			for name, interrupt := range map[string]func() error{
				"proxy killed": func() error { return bed.RestartProxy(t.Context(), syscall.SIGKILL) },
				"containerd restarted": func() error {
					if err := bed.RestartContainerd(t.Context()); err != nil {
						return err
					}
					return bed.WaitProxyReady(t.Context())
				},
			} {
				t.Run(name, func(t *testing.T) {
					f := newFront(t, "again17.test")
					p := push(t, fmt.Sprintf("again17-%d:1", number.Add(1)), 8, 8)
					f.throttle(wire)
					f.hold(p, 6)
					uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name), BytesPerSecond: limit})
					follow(t, uid, upTo(p, 6))
					must(t, interrupt())
					f.goOn()
					succeeds(t, uid)
					fetchedOnce(t, f, p)
				})
			}
		})
	}
	t.Run("kubelet's own", func(t *testing.T) {
		f := newFront(t, "kubelet17.test")
		p := push(t, "kubelet17:1", 2, 4)
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(f.image(p.name))})
		must(t, err)
		if op := succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(p.name)})); op.GetReason() != "Present" {
			t.Errorf("%v", op)
		}
		fetchedOnce(t, f, p)
	})
	t.Run("requests", requestsAtTheRegistry)
	t.Run("layers thrown away", func(t *testing.T) {
		discardUnpacked(t)
		unpackedLayersAreThere(t)
	})
	if l := ourLeases(t); len(l) != 0 {
		t.Errorf("leases left: %v", l)
	}
}
