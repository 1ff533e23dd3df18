// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/ctl"
	"github.com/cri-proxy/cri-proxy/internal/config"
)

const mib = 1 << 20

// imageDaemon answers with what a test puts into it.
type imageDaemon struct {
	opsv1.UnimplementedImagesServer
	socket string

	mu        sync.Mutex // guards all following fields
	refuse    error
	pulls     []*opsv1.PullOperation // newest first
	course    []*opsv1.PullOperation // what WatchPull sends
	lose      int                    // end this many watches early with Unavailable
	hang      bool                   // watches stay open after their course until a cancel
	asked     []*opsv1.PullRequest
	cancelled *opsv1.CancelPullRequest
	stop      chan struct{} // closed by a cancel
	deaf      bool          // cancels do nothing
	pins      []*opsv1.ImagePin
	gone      []string
	released  []*opsv1.ReleasePinsRequest
}

func (d *imageDaemon) Pull(_ context.Context, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, r)
	if d.refuse != nil {
		return nil, d.refuse
	}
	return &opsv1.PullOperation{Uid: r.GetUid(), Image: r.GetImage(), Phase: opsv1.PullPhase_PULL_WAITING,
		Reason: "InQueue", CreateTime: timestamppb.New(epoch)}, nil
}

func (d *imageDaemon) GetPull(_ context.Context, r *opsv1.GetPullRequest) (*opsv1.PullOperation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if i := slices.IndexFunc(d.pulls, func(op *opsv1.PullOperation) bool { return op.GetUid() == r.GetUid() }); i >= 0 {
		return d.pulls[i], nil
	}
	return nil, status.Errorf(codes.NotFound, "no pull %q on this node", r.GetUid())
}

func (d *imageDaemon) WatchPull(_ *opsv1.WatchPullRequest, s grpc.ServerStreamingServer[opsv1.PullOperation]) error {
	d.mu.Lock()
	course, hang := d.course, d.hang
	lose := d.lose > 0
	if lose {
		d.lose--
		course = course[:1]
	}
	d.mu.Unlock()
	for _, op := range course {
		if err := s.Send(op); err != nil {
			return err
		}
	}
	if lose {
		return status.Error(codes.Unavailable, "going away")
	}
	if !hang {
		return nil
	}
	select {
	case <-d.stop:
		end := proto.Clone(course[len(course)-1]).(*opsv1.PullOperation)
		end.Phase, end.Reason, end.Message, end.FinishTime = opsv1.PullPhase_PULL_CANCELLED, "Cancelled",
			d.cancelled.GetReason(), timestamppb.New(epoch)
		return s.Send(end)
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

func (d *imageDaemon) ListPulls(_ context.Context, r *opsv1.ListPullsRequest) (*opsv1.ListPullsResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := &opsv1.ListPullsResponse{}
	for _, op := range d.pulls {
		if !r.GetActiveOnly() || op.GetFinishTime() == nil {
			l.Pulls = append(l.Pulls, op)
		}
	}
	return l, nil
}

func (d *imageDaemon) CancelPull(_ context.Context, r *opsv1.CancelPullRequest) (*opsv1.PullOperation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cancelled = r
	if !d.deaf {
		close(d.stop)
	}
	return &opsv1.PullOperation{Uid: r.GetUid(), Phase: opsv1.PullPhase_PULL_CANCELLED,
		CreateTime: timestamppb.New(epoch)}, nil
}

func (d *imageDaemon) ListPins(context.Context, *opsv1.ListPinsRequest) (*opsv1.ListPinsResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &opsv1.ListPinsResponse{Pins: d.pins, GoneImageIds: d.gone}, nil
}

func (d *imageDaemon) ReleasePins(_ context.Context, r *opsv1.ReleasePinsRequest) (*opsv1.ReleasePinsResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.released = append(d.released, r)
	return &opsv1.ReleasePinsResponse{Released: 1}, nil
}

// fetching is a pull of an image with three layers, so many percent of the way.
func fetching(percent int64) *opsv1.PullOperation {
	op := &opsv1.PullOperation{
		Uid: "pull-1", Image: "nginx:1", Resolved: "docker.io/library/nginx:1", Owner: "ctl/alice",
		Phase:     opsv1.PullPhase_PULL_FETCHING,
		BytesDone: percent * mib, BytesTotal: 100 * mib, BytesPerSecond: 20 * mib, Attempt: 1,
		CreateTime: timestamppb.New(epoch),
	}
	left := op.GetBytesDone()
	for i, size := range []int64{50 * mib, 30 * mib, 20 * mib} {
		done := min(left, size)
		left -= done
		op.Layers = append(op.Layers, &opsv1.LayerProgress{Digest: fmt.Sprintf("sha256:%d23456789abcdef", i),
			BytesDone: done, BytesTotal: size})
	}
	if percent == 100 {
		op.Phase, op.BytesPerSecond = opsv1.PullPhase_PULL_UNPACKING, 0
	}
	return op
}

func ended(phase opsv1.PullPhase, reason, message string) *opsv1.PullOperation {
	op := fetching(100)
	op.Phase, op.Reason, op.Message, op.FinishTime, op.ImageId = phase, reason, message,
		timestamppb.New(epoch.Add(time.Minute)), "sha256:fedcba9876543210"
	return op
}

func pulled() *opsv1.PullOperation { return ended(opsv1.PullPhase_PULL_SUCCEEDED, "Pulled", "") }

func newImageDaemon(t *testing.T) *imageDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &imageDaemon{socket: filepath.Join(dir, "admin.sock"), stop: make(chan struct{})}
	waiting := fetching(0)
	waiting.Uid, waiting.Image, waiting.Phase, waiting.Reason, waiting.Message = "pull-2", "busybox",
		opsv1.PullPhase_PULL_WAITING, "YieldsToKubelet", "kubelet is pulling"
	waiting.BytesTotal, waiting.BytesPerSecond, waiting.Attempt = 0, 0, 0
	failed := ended(opsv1.PullPhase_PULL_FAILED, "NotFound", "registry docker.io has no such image")
	failed.Uid, failed.Image, failed.BytesTotal, failed.Resolved = "pull-0", "nope", 0, "docker.io/library/nope:latest"
	done := pulled()
	done.Uid, done.Owner = "pull-3", "ctl/bob"
	d.pulls = []*opsv1.PullOperation{done, waiting, fetching(45), failed}
	d.pins = []*opsv1.ImagePin{
		{ImageId: "sha256:0123456789abcdef", Image: "docker.io/library/busybox:latest",
			Owner: "ImagePullJob/default/preheat/uid", ExpireTime: timestamppb.New(epoch.Add(24 * time.Hour)),
			SizeBytes: 2 * mib},
		{ImageId: "sha256:fedcba9876543210", Image: "docker.io/library/nginx:1", Owner: "ctl/alice",
			ExpireTime: timestamppb.New(epoch), SizeBytes: 100 * mib},
		{ImageId: "sha256:fedcba9876543210", Image: "docker.io/library/nginx:1",
			Owner: "ImagePullJob/default/preheat/uid", ExpireTime: timestamppb.New(epoch.Add(time.Hour)),
			SizeBytes: 100 * mib},
	}
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	opsv1.RegisterImagesServer(s, d)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		owned.Wait()
	})
	return d
}

func (d *imageDaemon) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := command(&out, append(args, "--admin-socket", d.socket)...).ExecuteContext(ctx)
	return out.String(), err
}

func TestImageOutput(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"pulls", `
PULL     IMAGE     PHASE       REASON            DONE   SIZE        RATE         AGE
pull-3   nginx:1   Succeeded   Pulled            100%   100.0 MiB                90s
pull-2   busybox   Waiting     YieldsToKubelet                                   90s
pull-1   nginx:1   Fetching                      45%    100.0 MiB   20.0 MiB/s   90s
pull-0   nope      Failed      NotFound                                          90s
`, []string{"pulls"}},
		{"active, wide", `
PULL     IMAGE     PHASE      REASON            DONE   SIZE        RATE         AGE   ATTEMPT   OWNER       MESSAGE
pull-2   busybox   Waiting    YieldsToKubelet                                   90s   0         ctl/alice   kubelet is pulling
pull-1   nginx:1   Fetching                     45%    100.0 MiB   20.0 MiB/s   90s   1         ctl/alice   
`, []string{"pulls", "--active", "-o", "wide"}},
		{"one", `
PULL     IMAGE   PHASE    REASON     DONE   SIZE   RATE   AGE   MESSAGE
pull-0   nope    Failed   NotFound                        90s   registry docker.io has no such image
`, []string{"pulls", "pull-0"}},
		{"images", `
IMAGE                              IMAGE ID       SIZE        PINNED FOR     OWNER
docker.io/library/busybox:latest   0123456789ab   2.0 MiB     23h            ImagePullJob/default/preheat/uid
docker.io/library/nginx:1          fedcba987654   100.0 MiB   <ending>       ctl/alice
docker.io/library/nginx:1          fedcba987654   100.0 MiB   58m            ImagePullJob/default/preheat/uid
docker.io/library/nginx:1          fedcba987654   100.0 MiB   <not pinned>   ctl/bob
`, []string{"images"}},
		{"not waited for", `
PULL     IMAGE     PHASE     REASON    DONE   SIZE   RATE   AGE   MESSAGE
pull-9   nginx:1   Waiting   InQueue                        90s   
`, []string{"pull", "nginx:1", "--no-wait", "--uid", "pull-9"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := newImageDaemon(t).run(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.TrimPrefix(tt.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		d := newImageDaemon(t)
		d.gone = []string{"sha256:fedcba98765432"}
		for _, p := range d.pins {
			p.Gone = strings.HasPrefix(p.GetImageId(), "sha256:fedc")
		}
		for _, p := range d.pulls {
			p.ImageId = d.gone[0]
		}
		out, err := d.run(t, "images")
		if gone := strings.Count(out, " <gone> "); err != nil || gone != 3 || strings.Contains(out, "<not pinned>") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("nothing", func(t *testing.T) {
		d := newImageDaemon(t)
		d.pulls, d.pins = nil, nil
		for args, want := range map[string]string{"pulls": "No pulls.\n", "images": "No images.\n"} {
			if got, err := d.run(t, args); err != nil || got != want {
				t.Errorf("%q, %v", got, err)
			}
		}
	})
	t.Run("json", func(t *testing.T) {
		d := newImageDaemon(t)
		d.course = []*opsv1.PullOperation{fetching(10), pulled()}
		for args, into := range map[string]proto.Message{
			"pulls": &opsv1.ListPullsResponse{}, "images": &opsv1.ListPinsResponse{},
			"pulls pull-1": &opsv1.PullOperation{},
			"pull nginx:1": &opsv1.PullOperation{}, "pull nginx:1 --no-wait": &opsv1.PullOperation{},
			"unpin ctl/alice": &opsv1.ReleasePinsResponse{},
		} {
			out, err := d.run(t, append(strings.Fields(args), "-o", "json")...)
			if err != nil {
				t.Fatal(err)
			}
			if err := protojson.Unmarshal([]byte(out), into); err != nil {
				t.Errorf("%s: %v\n%s", args, err, out)
			}
		}
	})
}

func TestPullRequest(t *testing.T) {
	t.Setenv("SUDO_USER", "alice")
	auth := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(auth,
		[]byte(`{"auths":{"r.io":{"auth":"`+base64.StdEncoding.EncodeToString([]byte("u:p:q"))+`"}}}`),
		0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]*opsv1.PullRequest{
		"": {},
		"--limit 20MiB/s --pin 24h --always --auth-file " + auth: {
			BytesPerSecond: 20 * mib, PinFor: durationpb.New(24 * time.Hour),
			Policy:      opsv1.PullPolicy_PULL_POLICY_ALWAYS,
			Credentials: []*opsv1.RegistryCredential{{Match: "r.io", Username: "u", Password: "p:q"}},
		},
		"--runtime-handler kata --attempts 2 --timeout 1m --deadline 1h --uid u": {
			Uid: "u", RuntimeHandler: "kata", MaxAttempts: 2, AttemptTimeout: durationpb.New(time.Minute),
			Deadline: durationpb.New(time.Hour),
		},
	} {
		t.Run(args, func(t *testing.T) {
			d := newImageDaemon(t)
			if _, err := d.run(t,
				append([]string{"pull", "nginx:1", "--no-wait"}, strings.Fields(args)...)...); err != nil {
				t.Fatal(err)
			}
			got := d.asked[0]
			if want.Uid == "" {
				if !strings.HasPrefix(got.GetUid(), "ctl-") || len(got.GetUid()) != 16 {
					t.Errorf("uid %q", got.GetUid())
				}
				want.Uid = got.GetUid()
			}
			want.Image, want.Owner = "nginx:1", "ctl/alice"
			if !proto.Equal(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func TestPullLines(t *testing.T) {
	d := newImageDaemon(t)
	resolving, waiting := fetching(0), fetching(0)
	resolving.Phase, resolving.BytesTotal = opsv1.PullPhase_PULL_RESOLVING, 0
	waiting.Phase, waiting.Reason, waiting.Message = opsv1.PullPhase_PULL_WAITING, "BackOff",
		"attempt 2 of 4 in 1s: registry\ndown"
	d.course = []*opsv1.PullOperation{resolving, waiting, resolving, fetching(0), fetching(3), fetching(12),
		fetching(19), fetching(55), fetching(100), pulled()}
	out, err := d.run(t, "pull", "nginx:1")
	const want = `03:05:35.000 nginx:1 Resolving
03:05:35.000 nginx:1 Waiting (BackOff): attempt 2 of 4 in 1s: registry down
03:05:35.000 nginx:1 Resolving
03:05:35.000 nginx:1 Fetching 0 % of 100.0 MiB, 20.0 MiB/s, 5s left
03:05:35.000 nginx:1 Fetching 12 % of 100.0 MiB, 20.0 MiB/s, 5s left
03:05:35.000 nginx:1 Fetching 55 % of 100.0 MiB, 20.0 MiB/s, 3s left
03:05:35.000 nginx:1 Unpacking
03:05:35.000 nginx:1 Succeeded (Pulled)
`
	if err != nil || out != want {
		t.Errorf("%v\n%s\nwant\n%s", err, out, want)
	}
}

func TestPullOutcome(t *testing.T) {
	for want, end := range map[string]*opsv1.PullOperation{
		"": pulled(),
		"NotFound: registry docker.io has no such image": ended(opsv1.PullPhase_PULL_FAILED, "NotFound",
			"registry docker.io has no such image"),
		"the pull of nginx:1 has failed: RuntimeError": ended(opsv1.PullPhase_PULL_FAILED, "RuntimeError", ""),
		"the pull of nginx:1 was cancelled: job is deleted": ended(opsv1.PullPhase_PULL_CANCELLED, "Cancelled",
			"job is deleted"),
	} {
		d := newImageDaemon(t)
		d.course = []*opsv1.PullOperation{end}
		if _, err := d.run(t, "pull", "nginx:1"); err == nil != (want == "") || err != nil && err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	d := newImageDaemon(t)
	d.refuse = status.Error(codes.InvalidArgument, "image \"A\": invalid reference format")
	if _, err := d.run(t, "pull", "A"); err == nil || err.Error() != "image \"A\": invalid reference format" {
		t.Error(err)
	}
}

// TestPullDaemonRestarts loses the daemon on the way: the next one has no credentials.
func TestPullDaemonRestarts(t *testing.T) {
	auth := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(auth, []byte(`{"r.io":{"username":"u","password":"p"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	needs := fetching(0)
	needs.Phase, needs.Reason = opsv1.PullPhase_PULL_WAITING, "CredentialsNeeded"
	d := newImageDaemon(t)
	d.course, d.lose = []*opsv1.PullOperation{needs, needs, fetching(50), pulled()}, 1
	if out, err := d.run(t, "pull", "nginx:1", "--auth-file", auth); err != nil ||
		!strings.HasSuffix(out, "Succeeded (Pulled)\n") {
		t.Errorf("%v\n%s", err, out)
	}
	if n := len(d.asked); n < 2 || n > 3 || !proto.Equal(d.asked[0], d.asked[1]) ||
		d.asked[1].GetCredentials()[0].GetPassword() != "p" {
		t.Errorf("asked %d times: %v", n, d.asked)
	}
}

// TestPullInterrupted sends this process signals, as a terminal does at ^C.
func TestPullInterrupted(t *testing.T) {
	interrupt := func(t *testing.T) {
		if err := unix.Kill(os.Getpid(), unix.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	begin := func(t *testing.T, d *imageDaemon) (*buffer, <-chan error) {
		d.course, d.hang = []*opsv1.PullOperation{fetching(20)}, true
		out, over := &buffer{}, make(chan error, 1)
		go func() {
			over <- command(out, "pull", "nginx:1", "--uid", "u", "--admin-socket", d.socket).
				ExecuteContext(t.Context())
		}()
		out.await(t, "Fetching")
		return out, over
	}
	t.Run("cancels", func(t *testing.T) {
		t.Setenv("SUDO_USER", "alice")
		d := newImageDaemon(t)
		out, over := begin(t, d)
		interrupt(t)
		if err := <-over; err == nil || err.Error() != "the pull of nginx:1 was cancelled: cancelled by ctl/alice" {
			t.Error(err)
		}
		if d.cancelled.GetUid() != "u" || !strings.Contains(out.String(), "Cancelled") {
			t.Errorf("%v\n%s", d.cancelled, out)
		}
	})
	t.Run("twice leaves", func(t *testing.T) {
		d := newImageDaemon(t)
		d.deaf = true
		_, over := begin(t, d)
		interrupt(t)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for asked := false; !asked; <-tick.C {
			d.mu.Lock()
			asked = d.cancelled != nil
			d.mu.Unlock()
		}
		interrupt(t)
		if err := <-over; err == nil || err.Error() != "left while the pull is fetching; see cri-proxy ctl pulls u" {
			t.Error(err)
		}
	})
}

func TestUnpin(t *testing.T) {
	const job = "ImagePullJob/default/preheat/uid"
	for what, want := range map[string][]*opsv1.ReleasePinsRequest{
		job:         {{Owner: job}},
		"ctl/alice": {{Owner: "ctl/alice"}},
		"nginx:1": {{Owner: "ctl/alice", ImageId: "sha256:fedcba9876543210"},
			{Owner: job, ImageId: "sha256:fedcba9876543210"}},
		"docker.io/library/busybox:latest": {{Owner: job, ImageId: "sha256:0123456789abcdef"}},
		"0123456789ab":                     {{Owner: job, ImageId: "sha256:0123456789abcdef"}},
		"sha256:0123456789abcdef":          {{Owner: job, ImageId: "sha256:0123456789abcdef"}},
	} {
		t.Run(what, func(t *testing.T) {
			d := newImageDaemon(t)
			out, err := d.run(t, "unpin", what)
			if err != nil || out != fmt.Sprintf("%d pins ended.\n", len(want)) {
				t.Errorf("%v\n%s", err, out)
			}
			if !slices.EqualFunc(d.released, want,
				func(a, b *opsv1.ReleasePinsRequest) bool { return proto.Equal(a, b) }) {
				t.Errorf("got %v, want %v", d.released, want)
			}
		})
	}
	for _, what := range []string{"nginx", "0123", "nobody"} {
		if _, err := newImageDaemon(t).run(t, "unpin", what); err == nil ||
			!strings.Contains(err.Error(), "nothing is pinned by or as") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestCancelPull(t *testing.T) {
	d := newImageDaemon(t)
	if _, err := d.run(t, "pulls", "pull-1", "--cancel"); err != nil || d.cancelled.GetUid() != "pull-1" {
		t.Errorf("%v, %v", d.cancelled, err)
	}
	if _, err := newImageDaemon(t).run(t, "pulls", "none", "--cancel"); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
}

func TestImageUsageErrors(t *testing.T) {
	d := newImageDaemon(t)
	for args, want := range map[string]string{
		"pull":                     "name one image",
		"pull a b":                 "name one image",
		"pull a --pin -1h":         "--pin -1h0m0s is negative",
		"pull a --attempts -1":     "--attempts -1 is negative",
		"pull a --auth-file /none": "--auth-file: stat /none: no such file or directory",
		"unpin":                    "name an owner or an image",
		"pulls x --active":         "leave the UID out",
		"pulls --cancel":           "give its UID",
	} {
		_, err := d.run(t, strings.Fields(args)...)
		var invalid *config.InvalidError
		if !errors.As(err, &invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", args, err, want)
		}
	}
	if _, err := d.run(t, "pull", "a", "--limit", "fast"); err == nil ||
		!strings.Contains(err.Error(), "want bytes a second, such as 20MiB/s") {
		t.Error(err)
	}
}

func TestImageCompletion(t *testing.T) {
	d := newImageDaemon(t)
	for args, want := range map[string]string{
		"pulls": "pull-3\tnginx:1 Succeeded\npull-2\tbusybox Waiting\npull-1\tnginx:1 Fetching\npull-0\tnope Failed\n",
		"unpin": "ImagePullJob/default/preheat/uid\towner\n" +
			"ctl/alice\towner\ndocker.io/library/busybox:latest\timage\ndocker.io/library/nginx:1\timage\n",
	} {
		root := &cobra.Command{Use: "cri-proxy"}
		root.AddCommand(ctl.Command(now))
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(io.Discard)
		root.SetArgs([]string{cobra.ShellCompRequestCmd, "ctl", "--admin-socket=" + d.socket, args, ""})
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(out.String(), want) {
			t.Errorf("%s: %s", args, &out)
		}
	}
}
