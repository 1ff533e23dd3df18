// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/ctl"
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

// updatingDaemon has one upgrade: it gets as far as prepared by itself, then after a commit to
// committed, and after a change of the pod to patched.
type updatingDaemon struct {
	opsv1.UnimplementedOpsServer
	socket string

	mu                           sync.Mutex // guards all following fields
	refuse                       error
	prepared, committed, patched []*opsv1.Operation // states one after another
	lose                         int                // end this many watches early with Unavailable
	isCommitted                  bool
	asked                        []*opsv1.PrepareUpgradeRequest
	aborted                      *opsv1.AbortUpgradeRequest
	changed                      chan struct{} // closed and replaced
}

func newUpdatingDaemon(t *testing.T) *updatingDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") // as in newDaemon
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &updatingDaemon{
		socket: filepath.Join(dir, "admin.sock"), changed: make(chan struct{}),
		prepared: []*opsv1.Operation{
			state(opsv1.Phase_PHASE_PENDING), fetchingImage(20), fetchingImage(25), fetchingImage(70),
			state(opsv1.Phase_PHASE_STAGING), state(opsv1.Phase_PHASE_PREPARED),
		},
		committed: []*opsv1.Operation{state(opsv1.Phase_PHASE_PREPARED), state(opsv1.Phase_PHASE_ARMED)},
		patched: []*opsv1.Operation{state(opsv1.Phase_PHASE_ARMED), state(opsv1.Phase_PHASE_STOPPING),
			state(opsv1.Phase_PHASE_ADOPTING), state(opsv1.Phase_PHASE_SUCCEEDED)},
	}
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	opsv1.RegisterOpsServer(s, d)
	var owned sync.WaitGroup
	owned.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		owned.Wait()
	})
	return d
}

// state is the upgrade in a phase.
func state(p opsv1.Phase) *opsv1.Operation {
	op := &opsv1.Operation{
		Uid: "op-3", Kind: "Upgrade", Pod: &opsv1.PodRef{Namespace: "default", Name: "web"}, Phase: p,
		CreateTime: timestamppb.New(epoch), Requester: "ctl/me",
		Containers: []*opsv1.ContainerOperation{
			{Name: "app", Phase: p, Image: "app:v2",
				Pull: &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}}},
	}
	if p == opsv1.Phase_PHASE_SUCCEEDED || p == opsv1.Phase_PHASE_FAILED || p == opsv1.Phase_PHASE_CANCELLED {
		op.FinishTime = timestamppb.New(epoch.Add(time.Second))
	}
	return op
}

func fetchingImage(percent int64) *opsv1.Operation {
	op := state(opsv1.Phase_PHASE_PULLING)
	op.Containers[0].Pull = &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FETCHING, BytesDone: percent * mib,
		BytesTotal: 100 * mib, BytesPerSecond: 20 * mib}
	return op
}

// endedWith is the upgrade at its end.
func endedWith(p opsv1.Phase, message string) *opsv1.Operation {
	op := state(p)
	op.Message, op.Containers[0].Message = message, message
	return op
}

func (d *updatingDaemon) PrepareUpgrade(_ context.Context, r *opsv1.PrepareUpgradeRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, r)
	return d.prepared[0], d.refuse
}

func (d *updatingDaemon) CommitUpgrade(context.Context, *opsv1.CommitUpgradeRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refuse != nil {
		return nil, d.refuse
	}
	d.isCommitted = true
	return d.committed[0], nil
}

func (d *updatingDaemon) AbortUpgrade(_ context.Context, r *opsv1.AbortUpgradeRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refuse != nil {
		return nil, d.refuse
	}
	d.aborted = r
	end := endedWith(opsv1.Phase_PHASE_CANCELLED, r.GetReason())
	d.prepared = []*opsv1.Operation{end}
	close(d.changed)
	d.changed = make(chan struct{})
	return end, nil
}

// WatchOperation sends what there is for the upgrade as far as it is, and stays open unless it has
// ended.
func (d *updatingDaemon) WatchOperation(
	_ *opsv1.WatchOperationRequest, s grpc.ServerStreamingServer[opsv1.Operation],
) error {
	for {
		d.mu.Lock()
		course, changed := d.prepared, d.changed
		if d.isCommitted {
			course = d.committed
			d.committed = append([]*opsv1.Operation(nil), d.patched...) // the next watch is after the change of the pod
		}
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
		switch {
		case lose:
			return status.Error(codes.Unavailable, "going away")
		case course[len(course)-1].GetFinishTime() != nil:
			return nil
		}
		select {
		case <-changed:
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

func (d *updatingDaemon) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := command(&out, append(args, "--admin-socket", d.socket)...).ExecuteContext(ctx)
	return out.String(), err
}

func TestSetImage(t *testing.T) {
	d := newUpdatingDaemon(t)
	out, err := d.run(t, "set-image", "default/web", "-c", "app=app:v2", "--uid", "op-3", "--watch")
	const want = `03:05:35.000 default/web app Pending
03:05:35.000 default/web app Pulling: Fetching 20 % of 100.0 MiB, 20.0 MiB/s, 4s left
03:05:35.000 default/web app Pulling: Fetching 70 % of 100.0 MiB, 20.0 MiB/s, 2s left
03:05:35.000 default/web app Staging
03:05:35.000 default/web app Prepared
03:05:35.000 default/web app Armed
Ready. Now change the pod, within 10m:
  kubectl -n default set image pod/web app=app:v2
03:05:35.000 default/web app Stopping
03:05:35.000 default/web app Adopting
03:05:35.000 default/web app Succeeded
`
	if err != nil || out != want {
		t.Errorf("%v\n%s\nwant\n%s", err, out, want)
	}
}

func TestSetImageEnds(t *testing.T) {
	const command = "set-image default/web -c app=app:v2 -c side=side:v3 --uid op-3"
	kubelet := state(opsv1.Phase_PHASE_SUCCEEDED)
	kubelet.Containers[0].Method, kubelet.Containers[0].Warnings = "kubelet",
		[]string{"kubelet 1.30 hashes the whole spec"}
	for _, tt := range []struct {
		name, args string
		prepare    func(d *updatingDaemon)
		err, tail  string
		committed  bool
	}{
		{
			name: "ready", committed: true,
			tail: "Ready. Now change the pod, within 10m:\n  kubectl -n default set image pod/web app=app:v2 " +
				"side=side:v3\nTo see what becomes of it: cri-proxy ctl ops op-3 --watch\n",
		},
		{
			name: "prepared", args: "--prepare-only --order StartFirst --min-ready 5s --commit-timeout 1h",
			tail: "Prepared. To go on within 60m:\n  cri-proxy ctl set-image default/web -c app=app:v2 -c " +
				"side=side:v3 --admin-socket=SOCKET --commit-timeout=1h0m0s --min-ready=5s --order=StartFirst --uid " +
				"op-3\nTo take it back: cri-proxy ctl cancel op-3\n",
		},
		{
			name: "kubelet does it", prepare: func(d *updatingDaemon) { d.committed = []*opsv1.Operation{kubelet} },
			committed: true,
			tail: "app Succeeded: warning: kubelet 1.30 hashes the whole spec\nThe images are on the node, and " +
				"kubelet makes the new containers itself (see the warnings). Change the pod when you like:\n  " +
				"kubectl -n default set image pod/web app=app:v2 side=side:v3\n",
		},
		{
			name: "no such image", prepare: func(d *updatingDaemon) {
				d.prepared = []*opsv1.Operation{endedWith(opsv1.Phase_PHASE_FAILED, "no such image")}
			},
			err: "operation op-3: no such image", tail: "app Failed: no such image\n",
		},
		{
			name: "does not start", prepare: func(d *updatingDaemon) {
				d.committed = append(d.committed[:1],
					endedWith(opsv1.Phase_PHASE_FAILED, "the new container has exited"))
			},
			err: "operation op-3: the new container has exited", tail: "app Failed: the new container has exited\n",
			committed: true,
		},
		{
			name: "taken back meanwhile", args: "--watch", prepare: func(d *updatingDaemon) {
				d.patched = []*opsv1.Operation{endedWith(opsv1.Phase_PHASE_CANCELLED, "by another")}
			},
			err: "operation op-3 was cancelled: by another", tail: "app Cancelled: by another\n", committed: true,
		},
		{
			name: "had succeeded",
			prepare: func(d *updatingDaemon) {
				d.prepared = []*opsv1.Operation{
					state(opsv1.Phase_PHASE_SUCCEEDED)}
			},
			tail: "app Succeeded\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newUpdatingDaemon(t)
			if tt.prepare != nil {
				tt.prepare(d)
			}
			out, err := d.run(t, append(strings.Fields(command), strings.Fields(tt.args)...)...)
			if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
				t.Errorf("got %v, want %q", err, tt.err)
			}
			if out := strings.ReplaceAll(out, d.socket, "SOCKET"); !strings.HasSuffix(out, tt.tail) {
				t.Errorf("got\n%s\nwant at the end\n%s", out, tt.tail)
			}
			if d.isCommitted != tt.committed {
				t.Errorf("committed: %v", d.isCommitted)
			}
		})
	}
}

func TestSetImageRequest(t *testing.T) {
	t.Setenv("SUDO_USER", "alice")
	auth := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(auth, []byte(`{"r.io":{"username":"u","password":"p"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want *opsv1.PrepareUpgradeRequest
	}{
		{[]string{"-c", "app=app:v2"},
			&opsv1.PrepareUpgradeRequest{Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: "app:v2"}}}},
		{
			[]string{"-c", "b=r.io:5000/x@sha256:0", "-c", "a=y", "--order", "StartFirst", "--min-ready", "5s",
				"--always", "--auth-file", auth, "--uid", "u"},
			&opsv1.PrepareUpgradeRequest{
				Uid: "u", Credentials: []*opsv1.RegistryCredential{{Match: "r.io", Username: "u", Password: "p"}},
				Containers: []*opsv1.ContainerUpgrade{
					{Name: "b", Image: "r.io:5000/x@sha256:0", Order: opsv1.Order_ORDER_START_FIRST, MinReadySeconds: 5,
						PullPolicy: opsv1.PullPolicy_PULL_POLICY_ALWAYS},
					{Name: "a", Image: "y", Order: opsv1.Order_ORDER_START_FIRST, MinReadySeconds: 5,
						PullPolicy: opsv1.PullPolicy_PULL_POLICY_ALWAYS},
				},
			},
		},
		{
			[]string{"-c", "app=i", "--pin", "1h", "--prepare-timeout", "2h", "--commit-timeout", "3h"},
			&opsv1.PrepareUpgradeRequest{
				Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: "i"}},
				PinFor:     durationpb.New(time.Hour), PrepareTimeout: durationpb.New(2 * time.Hour),
				HoldTimeout: durationpb.New(3 * time.Hour),
			},
		},
	} {
		t.Run(strings.Join(tt.args[:2], " "), func(t *testing.T) {
			d := newUpdatingDaemon(t)
			if _, err := d.run(t, append([]string{"set-image", "default/web"}, tt.args...)...); err != nil {
				t.Fatal(err)
			}
			got := d.asked[0]
			tt.want.Pod, tt.want.Requester = &opsv1.PodRef{Namespace: "default", Name: "web"}, "ctl/alice"
			if tt.want.Uid == "" {
				if !strings.HasPrefix(got.GetUid(), "ctl-") || len(got.GetUid()) != 16 {
					t.Errorf("uid %q", got.GetUid())
				}
				tt.want.Uid = got.GetUid()
			}
			if !proto.Equal(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

// TestSetImageDaemonRestarts loses the daemon on the way: the next one has no credentials.
func TestSetImageDaemonRestarts(t *testing.T) {
	auth := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(auth, []byte(`{"r.io":{"username":"u","password":"p"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	d := newUpdatingDaemon(t)
	d.lose = 1
	if out, err := d.run(t, "set-image", "default/web", "-c", "app=app:v2", "--auth-file", auth,
		"--watch"); err != nil || !strings.HasSuffix(out, "Succeeded\n") {
		t.Errorf("%v\n%s", err, out)
	}
	if len(d.asked) != 2 || !proto.Equal(d.asked[0], d.asked[1]) ||
		d.asked[1].GetCredentials()[0].GetPassword() != "p" {
		t.Errorf("asked %d times: %v", len(d.asked), d.asked)
	}
}

func TestSetImageRefused(t *testing.T) {
	d := newUpdatingDaemon(t)
	d.refuse = status.Error(codes.FailedPrecondition, "container app is not running")
	if _, err := d.run(t, "set-image", "default/web", "-c", "app=app:v2"); err == nil ||
		err.Error() != "container app is not running" || status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}
}

// TestSetImageInterrupted sends this process signals, as a terminal does at ^C.
func TestSetImageInterrupted(t *testing.T) {
	t.Setenv("SUDO_USER", "alice")
	start := func(t *testing.T, d *updatingDaemon, out io.Writer, args ...string) <-chan error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		t.Cleanup(cancel)
		over := make(chan error, 1)
		go func() {
			over <- command(out,
				append([]string{"set-image", "default/web", "-c", "app=app:v2", "--admin-socket", d.socket},
					args...)...).ExecuteContext(ctx)
		}()
		return over
	}
	interrupt := func(t *testing.T) {
		if err := unix.Kill(os.Getpid(), unix.SIGINT); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("while it is prepared", func(t *testing.T) {
		d, out := newUpdatingDaemon(t), &buffer{}
		d.prepared = d.prepared[:4]
		over := start(t, d, out)
		out.await(t, "Fetching 70 %")
		interrupt(t)
		if err := <-over; err == nil || err.Error() != "operation op-3 was cancelled: cancelled by ctl/alice" {
			t.Errorf("%v\n%s", err, out)
		}
		if d.aborted.GetUid() != d.asked[0].GetUid() || d.isCommitted {
			t.Errorf("%v", d.aborted)
		}
	})
	t.Run("too late", func(t *testing.T) {
		d, out := newUpdatingDaemon(t), &buffer{}
		d.prepared = d.prepared[:4]
		over := start(t, d, out)
		out.await(t, "Fetching 70 %")
		d.mu.Lock()
		d.refuse = status.Error(codes.FailedPrecondition, "runs to its end")
		d.mu.Unlock()
		interrupt(t)
		if err := <-over; err == nil || err.Error() != "runs to its end" {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("while it waits for kubelet", func(t *testing.T) {
		d, out := newUpdatingDaemon(t), &buffer{}
		d.patched = d.patched[:2]
		over := start(t, d, out, "--watch")
		out.await(t, "app Stopping")
		interrupt(t)
		if err := <-over; err == nil ||
			!strings.HasPrefix(err.Error(),
				"interrupted while the operation is stopping; it goes on, see cri-proxy ctl ops ctl-") {
			t.Errorf("%v\n%s", err, out)
		}
		if d.aborted != nil {
			t.Error("what kubelet may have begun was aborted")
		}
	})
}

func TestSetImageOutput(t *testing.T) {
	armed := state(opsv1.Phase_PHASE_ARMED)
	armed.Containers[0].IncumbentId, armed.Containers[0].Method = "0123456789abcdef", "gate"
	armed.Containers = append(armed.Containers, &opsv1.ContainerOperation{
		Name: "side", Phase: opsv1.Phase_PHASE_SUCCEEDED, Image: "side:v3", Method: "kubelet",
		Warnings: []string{"left to kubelet"},
	})
	waits := fetchingImage(0)
	waits.Uid = "op-4"
	waits.Containers[0].Pull = &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_WAITING, Reason: "BackOff",
		Message: "attempt 2 of 4"}
	busy := fetchingImage(45)
	busy.Uid = "op-5"
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"list", `
OPERATION   KIND      POD           CONTAINERS   PHASE     DURATION   AGE
op-5        Upgrade   default/web   app          Pulling   90s        90s
op-4        Upgrade   default/web   app          Pulling   90s        90s
op-3        Upgrade   default/web   app,side     Armed     90s        90s
`, []string{"ops"}},
		{"wide list", `
OPERATION   KIND      POD           CONTAINERS   PHASE     DURATION   AGE   IMAGES           REQUESTER   MESSAGE
op-5        Upgrade   default/web   app          Pulling   90s        90s   app:v2           ctl/me      
op-4        Upgrade   default/web   app          Pulling   90s        90s   app:v2           ctl/me      
op-3        Upgrade   default/web   app,side     Armed     90s        90s   app:v2,side:v3   ctl/me      
`, []string{"ops", "-o", "wide"}},
		{"pulls", `
OPERATION   POD           CONTAINER   PHASE     ATTEMPT   EXIT   GAP   AGE   MESSAGE
op-5        default/web   app         Pulling                          90s   Fetching 45 % of 100.0 MiB, 20.0 MiB/s, 3s left
`, []string{"ops", "op-5"}},
		{"waits", `
OPERATION   POD           CONTAINER   PHASE     ATTEMPT   EXIT   GAP   AGE   MESSAGE
op-4        default/web   app         Pulling                          90s   Waiting (BackOff): attempt 2 of 4
`, []string{"ops", "op-4"}},
		{"wide", `
OPERATION   POD           CONTAINER   PHASE       ATTEMPT   EXIT   GAP   AGE   IMAGE     INCUMBENT       SUCCESSOR   REQUESTER   MESSAGE
op-3        default/web   app         Armed                              90s   app:v2    0123456789abc               ctl/me      
op-3        default/web   side        Succeeded                          90s   side:v3                               ctl/me      warning: left to kubelet
`, []string{"ops", "op-3", "-o", "wide"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			d.ops = []*opsv1.Operation{busy, waits, armed}
			got, err := d.run(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.TrimPrefix(tt.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// TestSetImageStructured has nothing but documents on the output.
func TestSetImageStructured(t *testing.T) {
	d := newUpdatingDaemon(t)
	out, err := d.run(t, "set-image", "default/web", "-c", "app=app:v2", "-o", "yaml")
	if err != nil || strings.Contains(out, "kubectl") || strings.Count(out, "---\n") != len(d.prepared)+2 {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSetImageCompletion(t *testing.T) {
	for args, want := range map[string]string{
		"set-image default/web --order ":           opscli.StopFirst + "\n" + opscli.StartFirst + "\n:4\n",
		"set-image default/web -c ":                ":4\n",
		"set-image ":                               ":4\n",
		"set-image default/web --auth-file conf":   "json\n:8\n",
		"set-image default/web --prepare-timeout=": ":0\n",
	} {
		t.Run(args, func(t *testing.T) {
			root := &cobra.Command{Use: "cri-proxy"}
			root.AddCommand(ctl.Command(now))
			var out bytes.Buffer
			root.SetOut(&out)
			root.SetErr(io.Discard)
			words := strings.Split(args, " ")
			root.SetArgs(append([]string{cobra.ShellCompRequestCmd, "ctl"}, words...))
			if err := root.ExecuteContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := out.String(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}
