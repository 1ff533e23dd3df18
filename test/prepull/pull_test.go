// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	mib = 1 << 20
	// large images take 2 s at this rate, or 16 at full size.
	wire = 64 * mib
)

func TestProgress(t *testing.T) {
	f := newFront(t, "progress.test")
	p := push(t, "progress:1", 8, layerMiB(16))
	f.throttle(wire)
	uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name)})
	var seen []int64
	began := time.Now()
	fastest := int64(0)
	op := follow(t, uid, func(op *opsv1.PullOperation) bool {
		if op.GetBytesTotal() != 0 && op.GetBytesTotal() != p.size {
			t.Fatalf("size %d, want %d", op.GetBytesTotal(), p.size)
		}
		layers := int64(0)
		for _, l := range op.GetLayers() {
			layers += l.GetBytesDone()
		}
		if layers != op.GetBytesDone() {
			t.Errorf("layers have %d bytes, all have %d", layers, op.GetBytesDone())
		}
		if op.GetBytesTotal() > 0 && (len(seen) == 0 || seen[len(seen)-1] != op.GetBytesDone()) {
			seen = append(seen, op.GetBytesDone())
		}
		fastest = max(fastest, op.GetBytesPerSecond())
		return finished(op)
	})
	took := time.Since(began)
	if op.GetPhase() != opsv1.PullPhase_PULL_SUCCEEDED || op.GetReason() != "Pulled" || op.GetBytesDone() != p.size ||
		len(op.GetLayers()) != 8 {
		t.Errorf("%v", op)
	}
	largest := int64(0)
	for i := 1; i < len(seen); i++ {
		if seen[i] < seen[i-1] {
			t.Errorf("progress goes back from %d to %d", seen[i-1], seen[i])
		}
		largest = max(largest, seen[i]-seen[i-1])
	}
	t.Logf("%d MiB in %s: %d steps, the largest %.1f %%, rate at most %d MiB/s", p.size/mib,
		took.Round(time.Millisecond), len(seen), 100*float64(largest)/float64(p.size), fastest/mib)
	if least := int(took / (600 * time.Millisecond)); len(seen) < max(4, least) || largest > p.size*2/5 {
		t.Errorf("progress is not smooth: %v", seen)
	}
	fetchedOnce(t, f, p)
	if img := present(t, f.image(p.name)); img.GetId() != op.GetImageId() || len(img.GetRepoDigests()) != 1 {
		t.Errorf("kubelet sees %v", img)
	}
	if l := ourLeases(t); len(l) != 0 {
		t.Errorf("leases left: %v", l)
	}
}

// TestGoesOn cuts pulls off in the middle.
func TestGoesOn(t *testing.T) {
	for name, interrupt := range map[string]func(t *testing.T, uid string, req *opsv1.PullRequest) string{
		"cancelled and pulled again": func(t *testing.T, uid string, req *opsv1.PullRequest) string {
			op, err := bed.pulls.CancelPull(t.Context(), &opsv1.CancelPullRequest{Uid: uid, Reason: "not now"})
			must(t, err)
			if op.GetPhase() != opsv1.PullPhase_PULL_CANCELLED || op.GetMessage() != "not now" {
				t.Errorf("%v", op)
			}
			if present(t, req.GetImage()) != nil {
				t.Error("the image is there, nothing was cancelled")
			}
			again := clone(req)
			again.Uid = ""
			return begin(t, again)
		},
		"proxy killed": func(t *testing.T, uid string, _ *opsv1.PullRequest) string {
			must(t, bed.RestartProxy(t.Context(), syscall.SIGKILL))
			return uid
		},
		"proxy restarted": func(t *testing.T, uid string, _ *opsv1.PullRequest) string {
			must(t, bed.RestartProxy(t.Context(), syscall.SIGTERM))
			return uid
		},
		"containerd restarted": func(t *testing.T, uid string, _ *opsv1.PullRequest) string {
			must(t, bed.RestartContainerd(t.Context()))
			return uid
		},
		"containerd killed": func(t *testing.T, uid string, _ *opsv1.PullRequest) string {
			must(t, bed.StopContainerd(t.Context(), syscall.SIGKILL))
			must(t, bed.StartContainerd(t.Context()))
			return uid
		},
	} {
		for _, limited := range []bool{false, true} {
			if limited && name != "cancelled and pulled again" && name != "proxy killed" {
				continue
			}
			t.Run(fmt.Sprintf("%s, limited %v", name, limited), func(t *testing.T) {
				f := newFront(t, "goes-on.test")
				p := push(t, fmt.Sprintf("goes-on-%d:1", number.Add(1)), 8, layerMiB(8))
				f.throttle(wire)
				f.hold(p, 6)
				req := &opsv1.PullRequest{Image: f.image(p.name)}
				if limited {
					req.BytesPerSecond = int64(20 * mib * scale())
				}
				uid := begin(t, req)
				follow(t, uid, upTo(p, 6))
				cut, again := f.bytes.Load(), time.Now()
				uid = interrupt(t, uid, req)
				f.goOn()
				op := succeeds(t, uid)
				if op.GetBytesTotal() != p.size || op.GetBytesDone() != p.size {
					t.Errorf("progress is not known: %v", op)
				}
				if rate := float64(f.bytes.Load()-cut) / time.Since(again).Seconds(); limited &&
					rate > float64(req.GetBytesPerSecond())*1.3 {
					t.Errorf("the limit is forgotten: %.1f MiB/s", rate/mib)
				}
				if name == "containerd killed" && f.bytes.Load() > p.size*21/20 {
					// It may forget a layer that it was about to enter into its books.
					t.Logf("containerd has forgotten a layer")
					f.bytes.Add(-p.size / 8)
				}
				fetchedOnce(t, f, p)
				if !limited && f.ranges.Load() == 0 { // a slow one has few layers under way
					t.Error("nothing went on from the middle of a layer")
				}
				if l := ourLeases(t); len(l) != 0 {
					t.Errorf("leases left: %v", l)
				}
			})
		}
	}
}

// The rate stays within a tenth of the limit. It is never above; a machine that has other things to
// do may be late once or twice, a limit that is too low always is.
func TestSpeedLimit(t *testing.T) {
	const limit = 20 * mib
	var rates []float64
	for i := range 3 {
		rates = append(rates, limitedRate(t, fmt.Sprintf("limit:%d", i), limit)/limit)
		last := rates[len(rates)-1]
		if last > 1.1 {
			t.Fatalf("%.2f times the limit", last)
		}
		if last >= 0.9 {
			return
		}
	}
	t.Errorf("times the limit: %.2f", rates)
}

// limitedRate pulls an image and returns how many bytes a second came.
func limitedRate(t *testing.T, name string, limit int64) float64 {
	t.Helper()
	f := newFront(t, strings.ReplaceAll(name, ":", "-")+".test")
	p := push(t, name, 8, layerMiB(8))
	uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name), BytesPerSecond: limit})
	type point struct {
		at    time.Time
		bytes int64
	}
	var points []point
	follow(t, uid, func(op *opsv1.PullOperation) bool {
		points = append(points, point{time.Now(), f.bytes.Load()})
		return op.GetBytesTotal() > 0 && op.GetBytesDone() >= op.GetBytesTotal()*9/10
	})
	// The beginning is a burst: the buffers of the connections fill at once.
	from := points[0]
	for _, x := range points {
		if x.bytes < p.size/5 {
			from = x
		}
	}
	to := points[len(points)-1]
	rate := float64(to.bytes-from.bytes) / to.at.Sub(from.at).Seconds()
	t.Logf("%.2f MiB/s over %s", rate/mib, to.at.Sub(from.at).Round(time.Millisecond))
	succeeds(t, uid)
	fetchedOnce(t, f, p)
	return rate
}

func TestKubeletWantsTheSame(t *testing.T) {
	f := newFront(t, "same.test")
	p := push(t, "same:1", 8, layerMiB(8))
	image := f.image(p.name)
	uid := begin(t, &opsv1.PullRequest{Image: image, BytesPerSecond: int64(scale()) * 4 * mib, PinFor: nil})
	op := follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetBytesDone() > p.size/5 })
	left := time.Duration(float64(p.size-op.GetBytesDone()) / float64(scale()*4*mib) * float64(time.Second))
	began := time.Now()
	_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(image)})
	must(t, err)
	took := time.Since(began)
	t.Logf("kubelet's pull took %s; at the limit it would have been %s more", took.Round(time.Millisecond),
		left.Round(time.Millisecond))
	if took > left/2 {
		t.Errorf("kubelet's pull took %s, nearly as long as ours would have", took)
	}
	op = succeeds(t, uid)
	if op.GetReason() != "Pulled" || op.GetBytesDone() != p.size {
		t.Errorf("%v", op)
	}
	fetchedOnce(t, f, p)
}

func TestKubeletWantsAnother(t *testing.T) {
	f, other := newFront(t, "ours.test"), newFront(t, "kubelets.test")
	p, q := push(t, "ours:1", 8, 8), push(t, "kubelets:1", 2, 16)
	f.throttle(wire / 2)
	other.throttle(wire / 8) // as long as bytes come
	f.hold(p, 6)
	uid := begin(t, &opsv1.PullRequest{Image: f.image(p.name)})
	follow(t, uid, half)
	pulled := make(chan error, 1)
	go func() {
		_, err := bed.kubelet.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec(other.image(q.name))})
		pulled <- err
	}()
	op := follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "YieldsToKubelet" })
	if op.GetPhase() != opsv1.PullPhase_PULL_WAITING {
		t.Errorf("%v", op)
	}
	// Our requests have been given up; from then on nothing comes, until kubelet has what it wants.
	f.goOn()
	eventually(t, func() error {
		if n := f.sending.Load(); n > 0 {
			return fmt.Errorf("%d blobs are still being sent", n)
		}
		return nil
	})
	before := f.bytes.Load()
	eventually(t, func() error {
		if n := other.bytes.Load(); n < q.size*8/10 {
			return fmt.Errorf("kubelet has %d bytes", n)
		}
		return nil
	})
	if now := f.bytes.Load(); now != before {
		t.Errorf("%d bytes came while kubelet was pulling", now-before)
	}
	must(t, <-pulled)
	if op := succeeds(t, uid); op.GetAttempt() != 1 {
		t.Errorf("giving way counts as an attempt: %v", op)
	}
	fetchedOnce(t, f, p)
	fetchedOnce(t, other, q)
}

func TestJoin(t *testing.T) {
	f := newFront(t, "join.test")
	p := push(t, "join:1", 4, 16)
	f.hold(p, 6)
	var uids []string
	for range 3 {
		uids = append(uids, begin(t, &opsv1.PullRequest{Image: f.image(p.name)}))
	}
	op := follow(t, uids[1], half)
	if op.GetPhase() != opsv1.PullPhase_PULL_FETCHING || len(op.GetLayers()) != 4 {
		t.Errorf("the second does not show the first's progress: %v", op)
	}
	f.goOn()
	for _, uid := range uids {
		succeeds(t, uid)
	}
	fetchedOnce(t, f, p)
}
