// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const mib = 1 << 20

// contents is containerd's content store and its leases. Its fields are guarded by fakeRuntime.mu.
type contents struct {
	open    map[string]*fakeLayer // by ref
	blobs   map[digest.Digest][]byte
	leases  map[string]*fakeLease
	unpacks time.Duration // a pull, once it has its bytes
	cut     int           // pulls that were ended before
	torn    int           // and while they unpacked
	looks   int           // at what comes
	infos   int           // asked of blobs that are there
	broken  bool          // it does not tell what comes
	swift   bool          // what it tells of is there a moment later
}

type fakeLease struct {
	began     time.Time
	resources []*leasesapi.Resource
}

// fakeLayer is one that comes at a rate.
type fakeLayer struct {
	digest      digest.Digest
	began, from time.Time // created, and when kept was all there was of it
	kept, total int64
	rate        int64 // bytes a second; 0: it stands still
	lease       string
}

// offset is as containerd writes it: a MiB at a time.
func (l *fakeLayer) offset(now time.Time) int64 {
	n := l.kept + int64(float64(l.rate)*now.Sub(l.from).Seconds())
	if n >= l.total {
		return l.total
	}
	return max(l.kept, n/mib*mib)
}

func newContents() *contents {
	return &contents{open: map[string]*fakeLayer{}, blobs: map[digest.Digest][]byte{}, leases: map[string]*fakeLease{}}
}

func refOf(d digest.Digest) string { return "layer-" + d.String() }

// rateOfOurs is how fast layers of ours come.
const rateOfOurs = 64 * mib

// fetch fetches an image of one layer, which takes so long.
func (r *fakeRuntime) fetch(ctx context.Context, req *runtimeapi.PullImageRequest, takes time.Duration) error {
	name := req.GetImage().GetImage()
	d := digest.FromString(name)
	ref, now := refOf(d), time.Now()
	r.mu.Lock()
	l := r.content.open[ref]
	if l == nil {
		l = &fakeLayer{digest: d, began: now, total: int64(takes.Seconds() * rateOfOurs), lease: leaseID(name + "|" + req.GetImage().GetRuntimeHandler())}
		r.content.open[ref] = l
	}
	if r.content.blobs[d] == nil {
		l.from, l.rate = now, rateOfOurs
		left := time.Duration(float64(l.total-l.kept) / rateOfOurs * float64(time.Second))
		r.mu.Unlock()
		select {
		case <-time.After(left):
		case <-ctx.Done():
			r.set(func() {
				l.kept, l.rate = l.offset(time.Now()), 0
				r.content.cut++
			})
			return status.FromContextError(ctx.Err()).Err()
		}
		r.mu.Lock()
	}
	r.content.blobs[d] = []byte{0}
	delete(r.content.open, ref)
	unpacks := r.content.unpacks
	r.mu.Unlock()
	select {
	case <-time.After(unpacks):
		return nil
	case <-ctx.Done():
		r.set(func() { r.content.torn++ })
		return status.FromContextError(ctx.Err()).Err()
	}
}

// answer answers calls for it; r.mu is held.
func (c *contents) answer(args, reply any) (known bool, err error) {
	now := time.Now()
	to, _ := reply.(proto.Message)
	switch req := args.(type) {
	case *contentapi.ListStatusesRequest:
		c.looks++
		if c.broken {
			return true, status.Error(codes.Internal, "broken")
		}
		resp := &contentapi.ListStatusesResponse{}
		for ref, l := range c.open {
			resp.Statuses = append(resp.Statuses, &contentapi.Status{Ref: ref, StartedAt: timestamppb.New(l.began), Offset: l.offset(now), Total: l.total})
		}
		for ref, l := range c.open {
			if !c.swift || l.lease == "" {
				continue
			}
			delete(c.open, ref)
			c.blobs[l.digest] = []byte{0}
			c.leases[l.lease].resources = append(c.leases[l.lease].resources, &leasesapi.Resource{ID: l.digest.String(), Type: "content"})
		}
		proto.Merge(to, resp)
	case *contentapi.InfoRequest:
		raw, ok := c.blobs[digest.Digest(req.GetDigest())]
		if !ok {
			return true, status.Error(codes.NotFound, "no such blob")
		}
		c.infos++
		info := &contentapi.Info{Digest: req.GetDigest(), Size: int64(len(raw))}
		if len(raw) > 1 {
			info.Labels = map[string]string{gcRef + ".config": "sha256:0"}
		}
		proto.Merge(to, &contentapi.InfoResponse{Info: info})
	case *leasesapi.ListRequest:
		resp := &leasesapi.ListResponse{}
		for id, l := range c.leases {
			resp.Leases = append(resp.Leases, &leasesapi.Lease{ID: id, CreatedAt: timestamppb.New(l.began)})
		}
		proto.Merge(to, resp)
	case *leasesapi.ListResourcesRequest:
		resp := &leasesapi.ListResourcesResponse{}
		if l := c.leases[req.GetID()]; l != nil {
			resp.Resources = l.resources
		}
		for ref, l := range c.open {
			if l.lease == req.GetID() {
				resp.Resources = append(resp.Resources, &leasesapi.Resource{ID: ref, Type: "ingests"})
			}
		}
		proto.Merge(to, resp)
	default:
		return false, nil
	}
	return true, nil
}

// blobStream is containerd's answer to a read of a blob.
type blobStream struct {
	grpc.ClientStream
	c    *contents
	req  *contentapi.ReadContentRequest
	sent bool
}

func (s *blobStream) SendMsg(m any) error {
	s.req = m.(*contentapi.ReadContentRequest)
	return nil
}
func (*blobStream) CloseSend() error { return nil }
func (s *blobStream) RecvMsg(m any) error {
	if s.sent {
		return io.EOF
	}
	s.sent = true
	proto.Merge(m.(proto.Message), &contentapi.ReadContentResponse{Data: s.c.blobs[digest.Digest(s.req.GetDigest())]})
	return nil
}

// kubelet pulls an image of one layer, whose bytes come at a rate, and go on coming until the pull is ended.
func (b *bubble) kubelet(image string, rate int64) (end func()) {
	l := &fakeLayer{digest: digest.FromString(image), began: time.Now(), from: time.Now(), total: 1 << 50, rate: rate}
	b.rt.set(func() { b.rt.content.open[refOf(l.digest)] = l })
	done := b.KubeletPulls(image)
	return func() {
		b.rt.set(func() { delete(b.rt.content.open, refOf(l.digest)) })
		done()
	}
}

// ours begins a pull of that many seconds.
func (b *bubble) ours(uid string, seconds int) {
	b.rt.set(func() { b.rt.takes = time.Duration(seconds) * time.Second })
	b.pull(&opsv1.PullRequest{Uid: uid, Image: uid})
}

func (b *bubble) yields() int { return int(testutil.ToFloat64(b.metrics.yields)) }

func inContent(t *testing.T, o Options, f func(t *testing.T, b *bubble)) {
	t.Helper()
	inBubble(t, o, func(t *testing.T, b *bubble) {
		b.rt.set(func() { b.rt.content = newContents() })
		f(t, b)
	})
}

func took(op *opsv1.PullOperation) time.Duration {
	return op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime())
}

func TestGivesWay(t *testing.T) {
	inContent(t, Options{Parallel: 2}, func(t *testing.T, b *bubble) {
		b.ours("a", 60)
		time.Sleep(time.Second)
		// kubelet asks for what is there: nobody minds, however often and slowly.
		for range 20 {
			done := b.KubeletPulls("there")
			time.Sleep(400 * time.Millisecond)
			done()
		}
		if b.want("a", resolving, ""); b.yields() != 0 || b.rt.count() != 1 {
			t.Errorf("%d pulls, %d yields", b.rt.count(), b.yields())
		}
		// Two pulls of kubelet's that overlap.
		began := time.Now()
		first := b.kubelet("first", 10*mib)
		time.Sleep(time.Millisecond)
		second := b.kubelet("second", 10*mib)
		time.Sleep(2 * time.Second)
		op := b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		since := time.Unix(0, 0)
		if _, at, ok := strings.Cut(op.GetMessage(), " since "); ok {
			since, _ = time.Parse(time.RFC3339, at[:len("2006-01-02T15:04:05Z")])
		}
		if !strings.HasPrefix(op.GetMessage(), "yields to kubelet's pull of another image since ") || !strings.HasSuffix(op.GetMessage(), " in any case") || since.Sub(began).Abs() > 3*time.Second {
			t.Errorf("%v", op)
		}
		b.ours("b", 60)
		b.want("b", waiting, opsv1.PullReasonYieldsToKubelet)
		first()
		first()
		time.Sleep(30 * time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		second()
		for _, uid := range []string{"a", "b"} {
			if op := b.end(uid); op.GetPhase() != succeeded || op.GetAttempt() != 1 {
				t.Errorf("%v", op)
			}
		}
		if b.yields() != 1 {
			t.Errorf("%d yields", b.yields())
		}
	})
}

// Bandwidth is what yields: once kubelet's pull has its bytes, it may unpack for as long as it likes.
func TestGoesOnWhileKubeletUnpacks(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		b.ours("a", 20)
		end := b.kubelet("kubelets", 20*mib)
		time.Sleep(5 * time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		b.rt.set(func() {
			d := digest.FromString("kubelets")
			b.rt.content.open[refOf(d)].total = b.rt.content.open[refOf(d)].offset(time.Now())
			b.rt.content.blobs[d] = []byte{0}
			delete(b.rt.content.open, refOf(d))
		})
		time.Sleep(time.Second)
		b.want("a", resolving, "")
		if op := b.end("a"); op.GetPhase() != succeeded || took(op) > 28*time.Second {
			t.Errorf("after %s: %v", took(op), op)
		}
		end()
	})
}

// Pulls of kubelet's that come to nothing, or to little, do not hold ours up.
func TestKubeletPullsInVain(t *testing.T) {
	for name, tt := range map[string]struct {
		rate   int64 // of each of twelve
		again  time.Duration
		yields int
		most   time.Duration
	}{
		"hang":                {0, 0, 0, time.Minute + time.Second},
		"hang, again":         {0, 5 * time.Second, 0, time.Minute + time.Second},
		"trickle":             {20 << 10, 0, 4, 75 * time.Second},
		"trickle, again":      {20 << 10, 30 * time.Second, 4, 75 * time.Second},
		"little comes":        {200 << 10, 0, 4, 75 * time.Second},
		"little comes, again": {200 << 10, 15 * time.Second, 4, 75 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inContent(t, Options{}, func(t *testing.T, b *bubble) {
				ctx, cancel := context.WithCancel(t.Context())
				again := tt.again
				if again == 0 {
					again = time.Hour
				}
				for i := range 12 {
					go func() {
						time.Sleep(time.Duration(i) * 100 * time.Millisecond)
						for ctx.Err() == nil {
							end := b.kubelet(fmt.Sprintf("broken-%d", i), tt.rate)
							select {
							case <-time.After(again):
							case <-ctx.Done():
							}
							end()
							time.Sleep(time.Second)
						}
					}()
				}
				time.Sleep(10 * time.Second)
				b.ours("a", 60)
				op := b.end("a")
				if op.GetPhase() != succeeded || b.yields() > tt.yields || took(op) > tt.most {
					t.Errorf("%d yields, %s: %v", b.yields(), took(op), op)
				}
				cancel()
				time.Sleep(2 * time.Second)
			})
		})
	}
}

// A small layer of ours that is there between two questions of one look is not taken for kubelet's.
func TestSwiftLayersAreOurs(t *testing.T) {
	inContent(t, Options{Parallel: 2}, func(t *testing.T, b *bubble) {
		b.ours("a", 60)
		lease := leaseID("docker.io/library/a:latest|")
		b.rt.set(func() {
			b.rt.content.leases[lease] = &fakeLease{began: time.Now()}
			b.rt.content.swift = true
			delete(b.rt.content.open, refOf(digest.FromString("docker.io/library/a:latest")))
		})
		done := b.KubeletPulls("there")
		for i := range 40 {
			time.Sleep(watchEvery)
			d := digest.FromString(name(i))
			b.rt.set(func() {
				b.rt.content.open[refOf(d)] = &fakeLayer{digest: d, began: time.Now(), from: time.Now().Add(-time.Second), total: 8 * mib, rate: rateOfOurs, lease: lease}
			})
		}
		b.ours("b", 60) // would begin but for kubelet's
		b.want("b", resolving, "")
		done()
		b.end("a")
		b.end("b")
	})
}

// A pull of kubelet's that works is seen among those that come to little.
func TestGivesWayBesideTrickles(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		var ends []func()
		for i := range 12 {
			ends = append(ends, b.kubelet(fmt.Sprintf("broken-%d", i), 20<<10))
		}
		b.ours("a", 60)
		time.Sleep(15 * time.Second)
		b.want("a", resolving, "")
		end := b.kubelet("works", 32*mib)
		time.Sleep(time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		time.Sleep(30 * time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		end()
		time.Sleep(rateOver)
		b.want("a", resolving, "")
		for _, end := range ends {
			end()
		}
		b.end("a")
	})
}

// What has all its bytes is not cut off, and needs no line to begin.
func TestUnpackingIsLeftAlone(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.set(func() { b.rt.content.unpacks = time.Minute })
		b.ours("a", 5)
		time.Sleep(10 * time.Second)
		end := b.kubelet("kubelets", 20*mib)
		b.ours("b", 5)
		time.Sleep(10 * time.Second)
		b.want("a", resolving, "")
		b.want("b", waiting, opsv1.PullReasonYieldsToKubelet)
		b.mu.Lock()
		b.pulls["b"].op.BytesTotal, b.pulls["b"].op.BytesDone = 1, 1
		b.mu.Unlock()
		if op := b.end("a"); op.GetPhase() != succeeded || b.rt.content.torn != 0 || b.yields() != 0 {
			t.Errorf("%d torn, %d yields: %v", b.rt.content.torn, b.yields(), op)
		}
		b.want("b", resolving, "")
		end()
		b.end("b")
	})
}

// A pull of kubelet's that takes an hour does not hold ours up for as long.
func TestYieldIsBounded(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		b.ours("a", 200)
		end := b.kubelet("large", 50*mib)
		time.Sleep(time.Second)
		op := b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		_, at, _ := strings.Cut(op.GetMessage(), "goes on at ")
		until, err := time.Parse(time.RFC3339, strings.TrimSuffix(at, " in any case"))
		if left := time.Until(until); err != nil || left > yieldMost || left < yieldMost-3*time.Second {
			t.Errorf("%v: %v", op, err)
		}
		time.Sleep(time.Until(until) + time.Second)
		b.want("a", resolving, "")
		// Two minutes stood aside, two on, two aside, and the rest.
		if op := b.end("a"); op.GetPhase() != succeeded || took(op).Round(20*time.Second) != 2*yieldMost+200*time.Second || b.yields() != 2 {
			t.Errorf("%d yields, %s: %v", b.yields(), took(op), op)
		}
		end()
	})
}

// Many short pulls with bytes hold ours up no longer than one: each costs what was under way.
func TestYieldsAreBounded(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for i := 0; ctx.Err() == nil; i++ {
				end := b.kubelet(fmt.Sprintf("short-%d", i), 40*mib)
				time.Sleep(600 * time.Millisecond)
				end()
				time.Sleep(400 * time.Millisecond)
			}
		}()
		b.ours("a", 100)
		if op := b.end("a"); op.GetPhase() != succeeded || took(op) > 4*yieldMost || b.yields() > int(2*yieldMost/cutCost) {
			t.Errorf("%d yields, %s: %v", b.yields(), took(op), op)
		}
		cancel()
		time.Sleep(2 * time.Second)
	})
}

// What something waits for never yields: neither when kubelet pulls already, nor later, nor when it is only then that somebody waits.
func TestUrgentNeverYields(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		end := b.kubelet("kubelets", 50*mib)
		b.rt.set(func() { b.rt.takes = 10 * time.Second })
		b.pull(&opsv1.PullRequest{Uid: "other", Image: "other"}) // for which kubelet is looked at
		time.Sleep(time.Second)
		b.want("other", waiting, opsv1.PullReasonYieldsToKubelet)
		ensure := func(uid string, most time.Duration) {
			t.Helper()
			began := time.Now()
			op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: uid, Image: uid}, nil)
			if err != nil || op.GetPhase() != succeeded || time.Since(began) > most {
				t.Errorf("%v, %v after %s", op, err, time.Since(began))
			}
		}
		ensure("upgrade", 10*time.Second+progressEvery)
		ensure("other", 10*time.Second+progressEvery) // had yielded
		if b.yields() != 1 {
			t.Errorf("%d yields", b.yields())
		}
		end()

		b.pull(&opsv1.PullRequest{Uid: "late", Image: "late"})
		b.pull(&opsv1.PullRequest{Uid: "queued", Image: "queued"})
		b.hurry("late")
		end = b.kubelet("more", 50*mib)
		ensure("late", 10*time.Second+progressEvery)
		if b.yields() != 1 {
			t.Errorf("%d yields", b.yields())
		}
		end()
		b.end("queued")
	})
}

// A slow pull that nobody waits for is not in the way of one of the same image that something waits for.
func TestUrgentOvertakes(t *testing.T) {
	for name, limit := range map[string]int64{"slow": mib, "as fast": 0} {
		t.Run(name, func(t *testing.T) {
			inContent(t, Options{}, func(t *testing.T, b *bubble) {
				b.rt.set(func() { b.rt.takes = 10 * time.Second })
				b.pull(&opsv1.PullRequest{Uid: "job", Image: "nginx", BytesPerSecond: limit})
				time.Sleep(time.Second)
				end := b.kubelet("kubelets", 50*mib) // and they do not yield while it waits
				ended := make(chan *opsv1.PullOperation)
				go func() {
					op, err := b.Ensure(t.Context(), &opsv1.PullRequest{Uid: "upgrade", Image: "nginx"}, nil)
					if err != nil {
						t.Error(err)
					}
					ended <- op
				}()
				time.Sleep(20 * time.Millisecond)
				synctest.Wait()
				if cut := b.rt.content.cut; cut != map[bool]int{true: 1, false: 0}[limit > 0] {
					t.Errorf("%d cut off", cut)
				}
				if op := <-ended; op.GetPhase() != succeeded || took(op) > 11*time.Second {
					t.Errorf("after %s: %v", took(op), op)
				}
				if op := b.end("job"); op.GetPhase() != succeeded || op.GetAttempt() > 1 || b.yields() != 0 {
					t.Errorf("%d yields: %v", b.yields(), op)
				}
				end()
			})
		})
	}
}

// A job's pull for which an upgrade of the same image waits is a job's all the same: it is tried again, and looked at.
func TestFollowedByUrgent(t *testing.T) {
	follow := func(t *testing.T, b *bubble) (stop func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = b.Ensure(ctx, &opsv1.PullRequest{Uid: "upgrade", Image: "nginx"}, nil)
		}()
		time.Sleep(time.Second)
		return func() {
			cancel()
			<-ended
		}
	}
	t.Run("refused", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.pulling = func(context.Context, *runtimeapi.PullImageRequest) error {
				time.Sleep(10 * time.Second)
				return unauthorized()
			}
			b.pull(&opsv1.PullRequest{Uid: "job", Image: "nginx", MaxAttempts: 3})
			stop := follow(t, b)
			if op := b.end("job"); op.GetReason() != opsv1.PullReasonUnauthorized || op.GetAttempt() != 3 {
				t.Errorf("%v", op)
			}
			stop()
		})
	})
	t.Run("another platform", func(t *testing.T) {
		inBubble(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.takes, b.rt.arch = 10*time.Second, "another"
			b.pull(&opsv1.PullRequest{Uid: "job", Image: "nginx"})
			stop := follow(t, b)
			if op := b.end("job"); op.GetReason() != opsv1.PullReasonInvalidImage {
				t.Errorf("%v", op)
			}
			stop()
		})
	})
	t.Run("gives way", func(t *testing.T) {
		inContent(t, Options{}, func(t *testing.T, b *bubble) {
			b.rt.set(func() { b.rt.takes = 20 * time.Second })
			b.pull(&opsv1.PullRequest{Uid: "job", Image: "nginx"})
			stop := follow(t, b)
			end := b.kubelet("kubelets", 50*mib)
			time.Sleep(2 * time.Second)
			if b.want("job", resolving, ""); b.yields() != 0 {
				t.Errorf("%d yields while an upgrade waits", b.yields())
			}
			stop()
			time.Sleep(2 * time.Second)
			b.want("job", waiting, opsv1.PullReasonYieldsToKubelet)
			end()
			b.end("job")
		})
	})
}

// Who may make jobs does not learn from their status what the pods of others run.
func TestYieldNamesNoImage(t *testing.T) {
	for name, tt := range map[string]struct {
		kubelets []string
		want     string
	}{
		"another":  {[]string{"registry.test/team-b/secret:1"}, "another image"},
		"several":  {[]string{"registry.test/team-b/secret:1", "registry.test/team-b/more:1"}, "another image"},
		"the same": {[]string{"registry.test/team-b/secret:1", "a"}, "the same image"},
		"unknown":  {[]string{""}, "an image"},
	} {
		t.Run(name, func(t *testing.T) {
			inContent(t, Options{}, func(t *testing.T, b *bubble) {
				b.ours("a", 10)
				var ends []func()
				for _, image := range tt.kubelets {
					ends = append(ends, b.kubelet(image, 50*mib))
				}
				time.Sleep(3 * time.Second)
				op := b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
				if !strings.HasPrefix(op.GetMessage(), "yields to kubelet's pull of "+tt.want+" since ") {
					t.Errorf("%v", op)
				}
				for _, end := range ends {
					end()
				}
				b.end("a")
			})
		})
	}
}

// A runtime that is not containerd does not tell what comes, and cannot go on with half an image: what runs is left alone.
func TestGivesWayBlindly(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, b *bubble) {
		b.rt.takes = 30 * time.Second
		b.pull(&opsv1.PullRequest{Uid: "a", Image: "nginx"})
		b.pull(&opsv1.PullRequest{Uid: "b", Image: "busybox"})
		done := b.KubeletPulls("large")
		time.Sleep(time.Second)
		b.want("a", resolving, "")
		if op := b.end("a"); op.GetPhase() != succeeded || b.rt.count() != 1 {
			t.Errorf("%d pulls: %v", b.rt.count(), op)
		}
		b.want("b", waiting, opsv1.PullReasonYieldsToKubelet)
		if op := b.end("b"); op.GetPhase() != succeeded || took(op) > yieldMost+31*time.Second {
			t.Errorf("%s: %v", took(op), op)
		}
		done()
	})
}

// containerd has few download slots for all pulls, and who is first goes first: kubelet's manifest waits for layers of ours.
func TestKubeletWaitsForASlot(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		b.ours("a", 60)
		b.mu.Lock()
		b.pulls["a"].slots.Store(true) // as where there are leases
		b.mu.Unlock()
		done := b.KubeletPulls("waits")
		time.Sleep(2 * time.Second)
		b.want("a", resolving, "") // it only looks its image up
		const manifest = "manifest-sha256:0000000000000000000000000000000000000000000000000000000000000000"
		b.rt.set(func() {
			b.rt.content.open[manifest] = &fakeLayer{began: time.Now(), from: time.Now(), total: 1000}
		})
		time.Sleep(time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		time.Sleep(2 * time.Second)
		b.want("a", resolving, "") // there is nothing to gain
		if !b.slotsWanted(t.Context(), b.pulls["a"]) {
			t.Error("it takes a slot again")
		}
		time.Sleep(10 * time.Second)
		if b.yields() != 1 {
			t.Errorf("%d yields", b.yields())
		}
		b.rt.set(func() { delete(b.rt.content.open, manifest) })
		done()
		if b.end("a"); b.slotsWanted(t.Context(), b.pulls["a"]) {
			t.Error("it takes no slot, and nobody wants one")
		}
	})
}

// Whoever wants a layer that ours is fetching waits for ours: it lets go.
func TestKubeletWantsALayer(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		const image = "docker.io/library/a:latest"
		base := digest.FromString(image) // ours fetches it
		b.ours("a", 100)
		b.mu.Lock()
		b.pulls["a"].op.Layers = []*opsv1.LayerProgress{{Digest: base.String(), BytesTotal: 6400 * mib}}
		b.mu.Unlock()
		time.Sleep(time.Second)
		raw, err := json.Marshal(ocispec.Manifest{Layers: []ocispec.Descriptor{{Digest: digest.FromString("there")}, {Digest: base}}})
		if err != nil {
			t.Fatal(err)
		}
		manifest := digest.FromBytes(raw)
		// One that is left over from before, one that wants something else: neither is in the way.
		b.rt.set(func() {
			b.rt.content.blobs[manifest] = raw
			b.rt.content.leases["left"] = &fakeLease{began: time.Now().Add(-time.Minute), resources: []*leasesapi.Resource{{ID: manifest.String(), Type: "content"}}}
			b.rt.content.leases["other"] = &fakeLease{began: time.Now(), resources: []*leasesapi.Resource{{ID: "sha256:none", Type: "content"}}}
		})
		done := b.KubeletPulls("shares")
		time.Sleep(5 * time.Second)
		b.want("a", resolving, "")
		b.rt.set(func() {
			b.rt.content.leases["other"].resources = append(b.rt.content.leases["other"].resources, &leasesapi.Resource{ID: manifest.String(), Type: "content"})
		})
		time.Sleep(time.Second)
		if op := b.want("a", waiting, opsv1.PullReasonYieldsToKubelet); !strings.HasPrefix(op.GetMessage(), "yields to kubelet's pull of another image, which wants the same layers, since ") || b.yields() != 1 {
			t.Errorf("%d yields: %v", b.yields(), op)
		}
		// As long as bytes come, ours have nothing to gain; that of another image may be pulled.
		kubelets := b.rt.content.open[refOf(base)]
		b.rt.set(func() { kubelets.from, kubelets.rate = time.Now(), 64<<10 })
		time.Sleep(2 * yieldMost)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		// It stands still: ours go on some time, and where kubelet's had come to.
		b.rt.set(func() { kubelets.kept, kubelets.rate = kubelets.offset(time.Now()), 0 })
		time.Sleep(yieldMost + time.Second)
		b.want("a", resolving, "")
		done()
		if op := b.end("a"); op.GetPhase() != succeeded || op.GetAttempt() != 1 {
			t.Errorf("%v", op)
		}
	})
}

// Who may create pods chooses what kubelet pulls.
func TestKubeletsManifestsAreBounded(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		b.ours("a", 10)
		b.mu.Lock()
		b.pulls["a"].op.Layers = []*opsv1.LayerProgress{{Digest: digest.FromString("docker.io/library/a:latest").String(), BytesTotal: 640 * mib}}
		b.mu.Unlock()
		raw := empties(`{"layers":[`, 4<<20-20, `]}`)
		b.rt.set(func() {
			b.rt.content.blobs[digest.FromBytes(raw)] = raw
			b.rt.content.leases["kubelets"] = &fakeLease{began: time.Now(), resources: []*leasesapi.Resource{{ID: digest.FromBytes(raw).String(), Type: "content"}}}
		})
		done := b.KubeletPulls("huge")
		if got := allocated(func() { time.Sleep(3 * time.Second) }); got > 64<<20 {
			t.Errorf("%d MiB of memory", got>>20)
		}
		done()
		if op := b.end("a"); op.GetPhase() != succeeded {
			t.Errorf("%v", op)
		}
	})
}

// What something waits for is not cut off then: its speed limit is lifted.
func TestUrgentLiftsItsLimit(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		d := digest.FromString("docker.io/library/a:latest")
		b.ours("a", 100)
		b.ours("other", 1) // for which kubelet is looked at
		b.hurry("a")
		limiter := rate.NewLimiter(1, 1)
		b.mu.Lock()
		b.pulls["a"].op.Layers = []*opsv1.LayerProgress{{Digest: d.String(), BytesTotal: 6400 * mib}}
		b.pulls["a"].limiter.Store(limiter)
		b.mu.Unlock()
		raw, err := json.Marshal(ocispec.Manifest{Layers: []ocispec.Descriptor{{Digest: d}}})
		if err != nil {
			t.Fatal(err)
		}
		b.rt.set(func() {
			b.rt.content.blobs[digest.FromBytes(raw)] = raw
			b.rt.content.leases["kubelets"] = &fakeLease{began: time.Now(), resources: []*leasesapi.Resource{{ID: digest.FromBytes(raw).String(), Type: "content"}}}
		})
		done := b.KubeletPulls("a")
		time.Sleep(time.Second)
		b.want("a", resolving, "")
		if limiter.Limit() != rate.Inf || b.yields() != 0 {
			t.Errorf("limit %v, %d yields", limiter.Limit(), b.yields())
		}
		done()
		b.end("a")
		b.end("other")
	})
}

// kubelet's pulls cost nothing while there is none of ours.
func TestNobodyLooks(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		end := b.kubelet("kubelets", 50*mib)
		time.Sleep(time.Minute)
		b.rt.set(func() {
			if n := b.rt.content.looks; n != 0 {
				t.Errorf("%d looks", n)
			}
		})
		b.ours("a", 60)
		time.Sleep(time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		end()
		b.end("a")
		b.rt.set(func() { b.rt.content.looks = 0 })
		end = b.kubelet("kubelets", 50*mib)
		time.Sleep(time.Minute)
		end()
		b.rt.set(func() {
			if n := b.rt.content.looks; n != 0 {
				t.Errorf("%d looks once ours had ended", n)
			}
		})
	})
}

// "In any case" holds when nobody can tell any more what comes.
func TestYieldEndsUnseen(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		base := digest.FromString("docker.io/library/a:latest")
		b.ours("a", 100)
		b.mu.Lock()
		b.pulls["a"].op.Layers = []*opsv1.LayerProgress{{Digest: base.String(), BytesTotal: 6400 * mib}}
		b.mu.Unlock()
		time.Sleep(time.Second)
		raw, err := json.Marshal(ocispec.Manifest{Layers: []ocispec.Descriptor{{Digest: base}}})
		if err != nil {
			t.Fatal(err)
		}
		b.rt.set(func() {
			b.rt.content.blobs[digest.FromBytes(raw)] = raw
			b.rt.content.leases["kubelets"] = &fakeLease{began: time.Now(), resources: []*leasesapi.Resource{{ID: digest.FromBytes(raw).String(), Type: "content"}}}
		})
		done := b.KubeletPulls("shares")
		time.Sleep(time.Second)
		b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
		b.rt.set(func() { b.rt.content.broken = true })
		time.Sleep(yieldMost)
		b.want("a", resolving, "")
		b.end("a")
		done()
	})
	t.Run("the line", func(t *testing.T) {
		inContent(t, Options{}, func(t *testing.T, b *bubble) {
			b.ours("a", 100)
			end := b.kubelet("kubelets", 50*mib)
			time.Sleep(time.Second)
			b.want("a", waiting, opsv1.PullReasonYieldsToKubelet)
			b.rt.set(func() { b.rt.content.broken = true })
			time.Sleep(yieldMost)
			b.want("a", resolving, "")
			b.end("a")
			end()
		})
	})
}

// A blob that has no labels is none that refers to others, or has them a moment later.
func TestBlobsWithoutLabels(t *testing.T) {
	inContent(t, Options{}, func(t *testing.T, b *bubble) {
		base, bare := digest.FromString("docker.io/library/a:latest"), digest.FromString("bare")
		b.ours("a", 600)
		b.mu.Lock()
		b.pulls["a"].op.Layers = []*opsv1.LayerProgress{{Digest: base.String(), BytesTotal: 6400 * mib}}
		b.mu.Unlock()
		b.rt.set(func() {
			b.rt.content.blobs[bare] = []byte{0}
			b.rt.content.leases["other"] = &fakeLease{began: time.Now(), resources: []*leasesapi.Resource{{ID: bare.String(), Type: "content"}}}
		})
		done := b.KubeletPulls("other")
		time.Sleep(5 * time.Second)
		b.rt.set(func() {
			if n := b.rt.content.infos; n < 2 || n > 2+int(bareFor/watchEvery) {
				t.Errorf("asked %d times", n)
			}
			b.rt.content.infos = 0
		})
		time.Sleep(time.Minute)
		b.rt.set(func() {
			if n := b.rt.content.infos; n != 0 {
				t.Errorf("asked %d times more", n)
			}
		})
		done()
		b.end("a")
	})
}
