// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

var number atomic.Int64

// begin asks for a pull; a UID is filled in, and the pull is cancelled and its image removed when
// the test ends.
func begin(t testing.TB, req *opsv1.PullRequest) string {
	t.Helper()
	if req.GetUid() == "" {
		req.Uid = fmt.Sprintf("pull-%d", number.Add(1))
	}
	op, err := bed.pulls.Pull(t.Context(), req)
	must(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, _ = bed.pulls.CancelPull(ctx, &opsv1.CancelPullRequest{Uid: op.GetUid()})
		_, _ = bed.direct.RemoveImage(ctx,
			&runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: op.GetResolved()}})
	})
	return op.GetUid()
}

// follow watches a pull until cond holds, over restarts of the proxy, and returns it as it is then.
// One that ends before fails the test.
func follow(t testing.TB, uid string, cond func(*opsv1.PullOperation) bool) *opsv1.PullOperation {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitFor)
	defer cancel()
	var last *opsv1.PullOperation
	for {
		op, err := followOnce(ctx, uid, cond, &last)
		if status.Code(err) == codes.Unavailable && ctx.Err() == nil {
			continue // the proxy is away
		}
		if err != nil {
			t.Fatalf("%v, after %v", err, last)
		}
		if !cond(op) {
			t.Fatalf("pull has ended: %v", op)
		}
		return op
	}
}

func followOnce(
	ctx context.Context, uid string, cond func(*opsv1.PullOperation) bool, last **opsv1.PullOperation,
) (*opsv1.PullOperation, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := bed.pulls.WatchPull(ctx, &opsv1.WatchPullRequest{Uid: uid})
	if err != nil {
		return nil, err
	}
	for {
		op, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		*last = op
		if cond(op) || op.GetFinishTime() != nil {
			return op, nil
		}
	}
}

func finished(op *opsv1.PullOperation) bool { return op.GetFinishTime() != nil }

func half(op *opsv1.PullOperation) bool {
	return op.GetBytesTotal() > 0 && op.GetBytesDone() >= op.GetBytesTotal()/2
}

// upTo holds when all has come that [front.hold] lets through, so that nothing is under way in the
// connections: what is there is lost when they are cut. containerd fetches three layers at a time
// and writes a MiB at a time (core/content/helpers.go copyWithBuffer); the front keeps some KiB.
func upTo(p pushed, tenths int64) func(*opsv1.PullOperation) bool {
	const fetchers, kept = 3, 64 << 10
	return func(op *opsv1.PullOperation) bool { return op.GetBytesDone() >= p.size*tenths/10-fetchers*mib-kept }
}

// succeeds follows a pull to its end, which must be good.
func succeeds(t testing.TB, uid string) *opsv1.PullOperation {
	t.Helper()
	op := follow(t, uid, finished)
	if op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED {
		t.Fatalf("pull has not succeeded: %v", op)
	}
	return op
}

// fails follows a pull to its end, which must be for the reason.
func fails(t testing.TB, uid, reason string) *opsv1.PullOperation {
	t.Helper()
	op := follow(t, uid, finished)
	if op.GetPhase() != opsv1.PullPhase_PULL_FAILED || op.GetReason() != reason {
		t.Fatalf("pull has not failed with %s: %v", reason, op)
	}
	t.Logf("%s: %s", op.GetReason(), op.GetMessage())
	return op
}

func spec(image string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: image} }

// present returns the image as the runtime has it, one that kubelet is not shown too.
func present(t testing.TB, image string) *runtimeapi.Image {
	t.Helper()
	st, err := bed.direct.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(image)})
	must(t, err)
	return st.GetImage()
}

// fetchedOnce checks that the registry sent the whole image and at most a twentieth more.
func fetchedOnce(t testing.TB, f *front, p pushed) {
	t.Helper()
	times := float64(f.bytes.Load()) / float64(p.size)
	t.Logf("fetched %.3f times the image of %d MiB, in %d requests for blobs, %d of them for a part", times, p.size>>20,
		f.blobs.Load(), f.ranges.Load())
	// What was under way in the connections when they were cut is lost, and does not grow with the
	// image: for 1 GiB a twentieth is the bound, for a small one 5 MiB, or a tenth, which is less
	// than a layer.
	if most := p.size + min(max(p.size/20, 5*mib), p.size/10); f.bytes.Load() < p.size || f.bytes.Load() > most {
		t.Errorf("the registry sent %.3f times the image", times)
	}
}

func clone(req *opsv1.PullRequest) *opsv1.PullRequest { return proto.Clone(req).(*opsv1.PullRequest) }
