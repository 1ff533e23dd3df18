// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"
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
	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// epoch is the time of the tests' operations, and now a bit later.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func now() time.Time { return epoch.Add(90 * time.Second) }

// daemon answers with what a test puts into it.
type daemon struct {
	opsv1.UnimplementedOpsServer
	socket string

	mu        sync.Mutex // guards all following fields
	refuse    error
	ops       []*opsv1.Operation // newest first
	course    []*opsv1.Operation // what WatchOperation sends
	lose      int                // end this many watches early with Unavailable
	hang      bool               // watches send their course and stay open
	restarted *opsv1.RestartRequest
	restarts  int
	overrides []*opsv1.ImageOverride
	cancelled *opsv1.CancelOperationRequest
}

func (d *daemon) Restart(_ context.Context, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.restarted = r
	d.restarts++
	if d.refuse != nil {
		return nil, d.refuse
	}
	op := proto.Clone(d.ops[0]).(*opsv1.Operation)
	op.Uid = r.GetUid()
	return op, nil
}

func (d *daemon) find(uid string) (*opsv1.Operation, error) {
	for _, op := range d.ops {
		if op.GetUid() == uid {
			return op, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "operation %s is not known, or has expired", uid)
}

func (d *daemon) GetOperation(_ context.Context, r *opsv1.GetOperationRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.find(r.GetUid())
}

func (d *daemon) WatchOperation(r *opsv1.WatchOperationRequest, s grpc.ServerStreamingServer[opsv1.Operation]) error {
	d.mu.Lock()
	course, hang := d.course, d.hang
	lose := d.lose > 0
	if lose {
		d.lose--
		course = course[:1]
	}
	d.mu.Unlock()
	if len(course) == 0 {
		return status.Errorf(codes.NotFound, "operation %s is not known, or has expired", r.GetUid())
	}
	for _, op := range course {
		if err := s.Send(op); err != nil {
			return err
		}
	}
	if lose {
		return status.Error(codes.Unavailable, "going away")
	}
	if hang {
		<-s.Context().Done()
	}
	return nil
}

func (d *daemon) ListOperations(
	_ context.Context, r *opsv1.ListOperationsRequest,
) (*opsv1.ListOperationsResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := &opsv1.ListOperationsResponse{}
	for _, op := range d.ops {
		if !r.GetActiveOnly() || op.GetFinishTime() == nil {
			l.Operations = append(l.Operations, op)
		}
	}
	return l, nil
}

func (d *daemon) CancelOperation(_ context.Context, r *opsv1.CancelOperationRequest) (*opsv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cancelled = r
	if d.refuse != nil {
		return nil, d.refuse
	}
	return d.find(r.GetUid())
}

func (d *daemon) NodeInfo(context.Context, *opsv1.NodeInfoRequest) (*opsv1.NodeInfoResponse, error) {
	return &opsv1.NodeInfoResponse{
		Version: "v1", NodeName: "node-1", StartTime: timestamppb.New(epoch), Listen: "/run/l.sock",
		Runtime: &opsv1.Runtime{Endpoint: "unix:///run/r.sock", State: "READY", Name: "containerd",
			Version: "v2"},
		KubeletLastCall: timestamppb.New(epoch.Add(88 * time.Second)), KubeletUserAgent: "grpc-go/1",
		ActiveSlots: []*opsv1.ActiveSlot{{PodUid: "pod-uid", Container: "app", OperationUid: "op-2",
			Phase: opsv1.Phase_PHASE_STOPPING}},
		Counters: &opsv1.Counters{Calls: 10, CallErrors: 1, Intercepted: 2, InFlight: 3, OperationsSucceeded: 4,
			OperationsFailed: 5, RecordedContainers: 6},
		RestartMethods: []*opsv1.RestartMethod{{Name: "gate", Reason: "CDI is off"}, {Name: "pidfd", Available: true},
			{Name: "plain", Available: true}},
	}, nil
}

// operations are one that runs and one that has succeeded.
func operations() []*opsv1.Operation {
	return []*opsv1.Operation{
		{
			Uid: "op-2", Kind: "Restart", Pod: &opsv1.PodRef{Namespace: "default", Name: "web", Uid: "pod-uid"},
			Phase:     opsv1.Phase_PHASE_STAGING,
			Requester: "ctl/me", CreateTime: timestamppb.New(epoch.Add(60 * time.Second)),
			Containers: []*opsv1.ContainerOperation{
				{Name: "app", Phase: opsv1.Phase_PHASE_STOPPING, IncumbentId: "0123456789abcdef",
					SuccessorId: "fedcba9876543210", Attempt: 4},
				{Name: "sidecar", Phase: opsv1.Phase_PHASE_STAGING, IncumbentId: "1111111111111111"},
			},
		},
		{
			Uid: "op-1", Kind: "Restart", Pod: &opsv1.PodRef{Namespace: "default", Name: "db"},
			Phase:      opsv1.Phase_PHASE_SUCCEEDED,
			CreateTime: timestamppb.New(epoch), FinishTime: timestamppb.New(epoch.Add(1250 * time.Millisecond)),
			Containers: []*opsv1.ContainerOperation{{
				Name: "db", Phase: opsv1.Phase_PHASE_SUCCEEDED, IncumbentId: "a", SuccessorId: "b", Attempt: 1,
				ExitCode:  137,
				StopTime:  timestamppb.New(epoch.Add(time.Second)),
				StartTime: timestamppb.New(epoch.Add(1060 * time.Millisecond)),
				Gap:       durationpb.New(60 * time.Millisecond),
				Warnings:  []string{"postStart failed:\nexit 1"},
			}},
		},
	}
}

// phases is the course of an operation on one container through these phases.
func phases(last string, ps ...opsv1.Phase) []*opsv1.Operation {
	var course []*opsv1.Operation
	for i, p := range ps {
		op := &opsv1.Operation{Uid: "op-2", Pod: &opsv1.PodRef{Namespace: "default", Name: "web"}, Phase: p,
			CreateTime: timestamppb.New(epoch),
			Containers: []*opsv1.ContainerOperation{{Name: "app", Phase: p}}}
		if i == len(ps)-1 && p >= opsv1.Phase_PHASE_SUCCEEDED {
			op.FinishTime = timestamppb.New(epoch)
			op.Message, op.Containers[0].Message = last, last
		}
		course = append(course, op)
	}
	return course
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	// Not t.TempDir: its names are longer than a socket path may be.
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &daemon{socket: filepath.Join(dir, "admin.sock"), ops: operations()}
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

// command is `ctl` with the clock of the tests.
func command(out io.Writer, args ...string) *cobra.Command {
	cmd := ctl.Command(now)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(out)
	cmd.SetErr(io.Discard)
	cmd.SetArgs(args)
	return cmd
}

func (d *daemon) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := command(&out, append(args, "--admin-socket", d.socket)...).ExecuteContext(ctx)
	return out.String(), err
}

func TestOutput(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"list", `
OPERATION   KIND      POD           CONTAINERS    PHASE       DURATION   AGE
op-2        Restart   default/web   app,sidecar   Staging     30s        30s
op-1        Restart   default/db    db            Succeeded   1.25s      90s
`, []string{"ops"}},
		{"active", `
OPERATION   KIND      POD           CONTAINERS    PHASE     DURATION   AGE
op-2        Restart   default/web   app,sidecar   Staging   30s        30s
`, []string{"ops", "--active"}},
		{"wide list", `
OPERATION   KIND      POD           CONTAINERS    PHASE       DURATION   AGE   IMAGES   REQUESTER   MESSAGE
op-2        Restart   default/web   app,sidecar   Staging     30s        30s            ctl/me      
op-1        Restart   default/db    db            Succeeded   1.25s      90s                        
`, []string{"ops", "-o", "wide"}},
		{"one running", `
OPERATION   POD           CONTAINER   PHASE      ATTEMPT   EXIT   GAP   AGE   MESSAGE
op-2        default/web   app         Stopping   4                      30s   
op-2        default/web   sidecar     Staging                           30s   
`, []string{"ops", "op-2"}},
		{"one finished", `
OPERATION   POD          CONTAINER   PHASE       ATTEMPT   EXIT   GAP    AGE   INCUMBENT   SUCCESSOR   REQUESTER   MESSAGE
op-1        default/db   db          Succeeded   1         137    60ms   90s   a           b                       warning: postStart failed: exit 1
`, []string{"ops", "op-1", "-o", "wide"}},
		{"status", `
Node:          node-1
Version:       v1
Uptime:        90s
Listen:        /run/l.sock
Kubelet:       last call 2s ago (grpc-go/1)
Runtime:       containerd v2, READY at unix:///run/r.sock
Calls:         10, 3 in flight, 1 with errors
Interceptors:  2 calls, 0 faults
Operations:    1 slots active, 4 succeeded, 5 failed
Restarts:      pidfd (no gate: CDI is off)
Identity:      none, commands come over this socket only (ops.address is not set)
Recorded:      6 containers

POD UID   CONTAINER   OPERATION   PHASE
pod-uid   app         op-2        Stopping
`, []string{"status"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := newDaemon(t).run(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.TrimPrefix(tt.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestNoOperations(t *testing.T) {
	d := newDaemon(t)
	d.ops = nil
	if got, err := d.run(t, "ops"); err != nil || got != "No operations.\n" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestStructuredOutput(t *testing.T) {
	d := newDaemon(t)
	for name, tt := range map[string]struct {
		args []string
		into proto.Message
		want proto.Message
	}{
		"list": {[]string{"ops"}, &opsv1.ListOperationsResponse{},
			&opsv1.ListOperationsResponse{Operations: operations()}},
		"one":    {[]string{"ops", "op-1"}, &opsv1.Operation{}, operations()[1]},
		"cancel": {[]string{"cancel", "op-1"}, &opsv1.Operation{}, operations()[1]},
	} {
		t.Run(name+" json", func(t *testing.T) {
			out, err := d.run(t, append(tt.args, "-o", "json")...)
			if err != nil {
				t.Fatal(err)
			}
			if err := protojson.Unmarshal([]byte(out), tt.into); err != nil || !proto.Equal(tt.into, tt.want) {
				t.Errorf("%v\n%s", err, out)
			}
			if again, _ := d.run(t, append(tt.args, "-o", "json")...); again != out {
				t.Error("not stable")
			}
		})
		t.Run(name+" yaml", func(t *testing.T) {
			out, err := d.run(t, append(tt.args, "-o", "yaml")...)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(out, "{") {
				t.Errorf("not in block style\n%s", out)
			}
			var value any
			if err := yaml.Unmarshal([]byte(out), &value); err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			if err := protojson.Unmarshal(b, tt.into); err != nil || !proto.Equal(tt.into, tt.want) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// TestYAMLKeepsStrings has values that YAML would read as something else.
func TestYAMLKeepsStrings(t *testing.T) {
	d := newDaemon(t)
	want := &opsv1.Operation{Uid: "0123", Kind: "true", Message: "a: b\n# c", Requester: "1e3",
		Pod: &opsv1.PodRef{Name: "null", Namespace: "2026-01-02"}}
	d.ops = []*opsv1.Operation{want}
	out, err := d.run(t, "ops", "0123", "-o", "yaml")
	if err != nil {
		t.Fatal(err)
	}
	var value map[string]any
	if err := yaml.Unmarshal([]byte(out), &value); err != nil {
		t.Fatal(err)
	}
	b, _ := json.Marshal(value)
	got := &opsv1.Operation{}
	if err := protojson.Unmarshal(b, got); err != nil || !proto.Equal(got, want) {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestRestartRequest(t *testing.T) {
	t.Setenv("SUDO_USER", "alice")
	grace := int64(10)
	zero := int64(0)
	pod := &opsv1.PodRef{Namespace: "default", Name: "web"}
	auth := authFile(t)
	for _, tt := range []struct {
		args []string
		want *opsv1.RestartRequest
	}{
		{[]string{"-c", "app"}, &opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app"}}}},
		{
			[]string{"-c", "b", "-c", "a", "--grace", "10s", "--ordered", "--force", "--uid", "u"},
			&opsv1.RestartRequest{Uid: "u", Ordered: true, Force: true,
				Containers: []*opsv1.ContainerRestart{{Name: "b", GracePeriodSeconds: &grace},
					{Name: "a", GracePeriodSeconds: &grace}}},
		},
		{[]string{"-c", "app", "--grace", "0s"},
			&opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app", GracePeriodSeconds: &zero}}}},
		{[]string{"-c", "app", "--expect", "containerd://x"},
			&opsv1.RestartRequest{
				Containers: []*opsv1.ContainerRestart{{Name: "app", ExpectedContainerId: "containerd://x"}}}},
		{
			[]string{"-c", "app", "--image", "r.io/app:v2", "--auth-file", auth, "--always"},
			&opsv1.RestartRequest{
				Containers: []*opsv1.ContainerRestart{
					{Name: "app", Image: "r.io/app:v2", PullPolicy: opsv1.PullPolicy_PULL_POLICY_ALWAYS}},
				Credentials: []*opsv1.RegistryCredential{{Match: "r.io", Username: "u", Password: "p"}},
			},
		},
		{[]string{"-c", "a", "-c", "b", "--revert-image"},
			&opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "a", RevertImage: true},
				{Name: "b", RevertImage: true}}}},
		{[]string{"-c", "a", "-c", "b", "--expect", "b=y"},
			&opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "a"},
				{Name: "b", ExpectedContainerId: "y"}}}},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			d := newDaemon(t)
			out, err := d.run(t, append([]string{"restart", "default/web"}, tt.args...)...)
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Pod, tt.want.Requester = pod, "ctl/alice"
			if tt.want.Uid == "" {
				if !strings.HasPrefix(d.restarted.GetUid(), "ctl-") || len(d.restarted.GetUid()) != 16 {
					t.Errorf("uid %q", d.restarted.GetUid())
				}
				tt.want.Uid = d.restarted.GetUid()
			}
			if !proto.Equal(d.restarted, tt.want) {
				t.Errorf("got  %v\nwant %v", d.restarted, tt.want)
			}
			if !strings.Contains(out, tt.want.GetUid()) {
				t.Errorf("the operation is not printed\n%s", out)
			}
		})
	}
}

func TestUsageErrors(t *testing.T) {
	d := newDaemon(t)
	for _, tt := range []struct{ args, want string }{
		{"restart", "name one pod"},
		{"restart a/b c/d -c x", "name one pod"},
		{"restart web -c app", `"web": name the pod as NAMESPACE/POD`},
		{"restart /web -c app", "name the pod as NAMESPACE/POD"},
		{"restart a/b/c -c app", "name the pod as NAMESPACE/POD"},
		{"restart a/b", "which container? give -c NAME"},
		{"restart a/b -c x -c x", "-c x is given twice"},
		{"restart a/b -c x --grace 1500ms", "want whole seconds"},
		{"restart a/b -c x --grace -1s", "want whole seconds"},
		{"restart a/b -c x -c y --expect id", "with several containers write NAME=ID"},
		{"restart a/b -c x --expect y=id", "want NAME=ID with a NAME given as -c"},
		{"restart a/b -c x --expect x=", "want NAME=ID"},
		{"restart a/b -c x --image i --revert-image", "exclude each other"},
		{"restart a/b -c x -c y --image i", "--image is for one container"},
		{"restart a/b -c x --auth-file /nonexistent", "--auth-file is for --image"},
		{"restart a/b -c x --always", "--always is for --image"},
		{"restart a/b -c x --image i --auth-file /nonexistent", "--auth-file: stat /nonexistent"},
		{"ops op-1 --active", "leave the UID out"},
		{"set-image", "name one pod"},
		{"set-image web -c app=i", `"web": name the pod as NAMESPACE/POD`},
		{"set-image a/b", "which container, and which image? give -c NAME=IMAGE"},
		{"set-image a/b -c app", "-c app: want NAME=IMAGE"},
		{"set-image a/b -c app=", "-c app=: want NAME=IMAGE"},
		{"set-image a/b -c =i", "-c =i: want NAME=IMAGE"},
		{"set-image a/b -c app=i -c app=j", "-c app is given twice"},
		{"set-image a/b -c app=i --order Both", "want StopFirst or StartFirst"},
		{"set-image a/b -c app=i --min-ready 5s", "--min-ready is for --order StartFirst"},
		{"set-image a/b -c app=i --commit-timeout -1s", "--commit-timeout -1s is negative"},
		{"set-image a/b -c app=i --prepare-only --watch", "--prepare-only ends before"},
		{"set-image a/b -c app=i --auth-file /nonexistent", "--auth-file: stat /nonexistent"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			_, err := d.run(t, strings.Fields(tt.args)...)
			var invalid *config.InvalidError
			if !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	if _, err := d.run(t, "ops", "-o", "xml"); err == nil ||
		!strings.Contains(err.Error(), "want json, yaml, table, wide") {
		t.Errorf("got %v", err)
	}
}

func TestDaemonErrors(t *testing.T) {
	d := newDaemon(t)
	d.refuse = status.Error(codes.FailedPrecondition, "container app is not running")
	for _, args := range []string{"restart a/b -c app", "cancel op-1"} {
		if _, err := d.run(t, strings.Fields(args)...); err == nil || err.Error() != "container app is not running" ||
			status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: %v", args, err)
		}
	}
	for _, args := range []string{"ops none", "ops none --watch"} {
		if _, err := d.run(t, strings.Fields(args)...); err == nil ||
			err.Error() != "operation none is not known, or has expired" {
			t.Errorf("%s: %v", args, err)
		}
	}
}

func TestCancel(t *testing.T) {
	d := newDaemon(t)
	if _, err := d.run(t, "cancel", "op-2", "--reason", "wrong pod"); err != nil {
		t.Fatal(err)
	}
	if d.cancelled.GetUid() != "op-2" || d.cancelled.GetReason() != "wrong pod" {
		t.Errorf("%v", d.cancelled)
	}
}

func TestDaemonNotThere(t *testing.T) {
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	none, dead := filepath.Join(dir, "none.sock"), filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for socket, want := range map[string]string{
		none: "no cri-proxy at " + none + ": the socket does not exist; start the daemon (systemctl start " +
			"cri-proxy.socket)",
		dead: "no cri-proxy at " + dead + ": the daemon behind the socket is gone; start it",
	} {
		t.Setenv(opscli.SocketVariable, socket)
		for _, args := range []string{"status", "version", "ops", "ops x", "ops -w", "cancel x", "restart a/b -c c",
			"overrides", "set-image a/b -c c=i"} {
			err := command(io.Discard, strings.Fields(args)...).ExecuteContext(t.Context())
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s: got %v, want %s", args, err, want)
			}
		}
	}
}

func TestWatch(t *testing.T) {
	const (
		staging, stopping, starting = opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_STOPPING,
			opsv1.Phase_PHASE_STARTING
		succeeded, failed, cancelledPh = opsv1.Phase_PHASE_SUCCEEDED, opsv1.Phase_PHASE_FAILED,
			opsv1.Phase_PHASE_CANCELLED
	)
	t.Run("lines", func(t *testing.T) {
		d := newDaemon(t)
		d.course = phases("", staging, stopping, stopping, succeeded)
		out, err := d.run(t, "restart", "default/web", "-c", "app", "--watch")
		if want := "03:05:35.000 default/web app Staging\n03:05:35.000 default/web app Stopping\n03:05:35.000 " +
			"default/web app Succeeded\n"; err != nil || out != want {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("documents", func(t *testing.T) {
		d := newDaemon(t)
		d.course = phases("", staging, succeeded)
		out, err := d.run(t, "ops", "op-2", "-w", "-o", "yaml")
		if err != nil || strings.Count(out, "---\n") != 2 {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("failure", func(t *testing.T) {
		d := newDaemon(t)
		d.course = phases("image is gone", starting, failed)
		out, err := d.run(t, "restart", "default/web", "-c", "app", "--watch")
		if err == nil || err.Error() != "operation op-2: image is gone" ||
			!strings.Contains(out, "app Failed: image is gone\n") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		d := newDaemon(t)
		d.course = phases("by me", staging, cancelledPh)
		if _, err := d.run(t, "ops", "op-2", "--watch"); err == nil ||
			err.Error() != "operation op-2 was cancelled: by me" {
			t.Error(err)
		}
	})
	t.Run("daemon restarts", func(t *testing.T) {
		d := newDaemon(t)
		d.course, d.lose = phases("", staging, stopping, succeeded), 2
		out, err := d.run(t, "ops", "op-2", "--watch")
		if err != nil || !strings.HasSuffix(out, "Succeeded\n") || strings.Count(out, "Staging") != 1 {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		d := newDaemon(t)
		d.course, d.hang = phases("", staging, stopping), true
		// The time includes all that comes before, for which it may be too short on a machine with
		// too much to do; then it gets more.
		for timeout := 300 * time.Millisecond; ; timeout *= 2 {
			_, err := d.run(t, "restart", "default/web", "-c", "app", "--watch", "--timeout", timeout.String())
			if err != nil &&
				strings.HasPrefix(err.Error(),
					"gave up waiting while the operation is stopping; it goes on, see cri-proxy ctl ops ctl-") {
				return
			}
			if timeout > 30*time.Second {
				t.Fatal(err)
			}
		}
	})
}

func TestWatchList(t *testing.T) {
	d := newDaemon(t)
	out := &buffer{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	over := make(chan error, 1)
	go func() { over <- command(out, "ops", "--watch", "--admin-socket", d.socket).ExecuteContext(ctx) }()
	out.await(t, "op-2        Restart   default/web   app,sidecar   Staging")
	d.mu.Lock()
	d.ops[0] = proto.Clone(d.ops[0]).(*opsv1.Operation)
	d.ops[0].Phase, d.ops[0].FinishTime = opsv1.Phase_PHASE_SUCCEEDED, timestamppb.New(now())
	d.mu.Unlock()
	out.await(t, "app,sidecar   Succeeded")
	cancel()
	if err := <-over; err != nil {
		t.Error(err)
	}
	if n := strings.Count(out.String(), "op-1"); n != 1 {
		t.Errorf("op-1 did not change and is printed %d times\n%s", n, out)
	}
}

// buffer is a bytes.Buffer that can be waited on.
type buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *buffer) await(t *testing.T, want string) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	give := time.After(2 * time.Minute)
	for !strings.Contains(b.String(), want) {
		select {
		case <-tick.C:
		case <-give:
			t.Fatalf("no %q in\n%s", want, b)
		}
	}
}

func TestCompletion(t *testing.T) {
	d := newDaemon(t)
	d.overrides = imageOverrides()
	for args, want := range map[string]string{
		"ops": "op-2\tRestart default/web Staging\nop-1\tRestart default/db " +
			"Succeeded\n",
		"cancel":                                "op-2\tRestart default/web Staging\n",
		"restart":                               ":4\n",
		"restart --revert-image":                "default/web\tr.io/app:debug\nshop/cart-0\tcart\n:36\n",
		"restart default/web --revert-image -c": "app\tr.io/app:debug\n:36\n",
		"overrides":                             ":4\n",
	} {
		root := &cobra.Command{Use: "cri-proxy"}
		root.AddCommand(ctl.Command(now))
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(io.Discard)
		root.SetArgs(slices.Concat([]string{cobra.ShellCompRequestCmd, "ctl", "--admin-socket=" + d.socket},
			strings.Fields(args), []string{""}))
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(out.String(), want) {
			t.Errorf("%s: %s", args, &out)
		}
	}
}

func TestVersion(t *testing.T) {
	out, err := newDaemon(t).run(t, "version")
	if err != nil || !strings.HasPrefix(out, "Client: ") || !strings.HasSuffix(out, "\nDaemon: v1\n") {
		t.Errorf("%v\n%s", err, out)
	}
}
