// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// hold keeps the first call of the engine that begins with prefix back until the returned release
// is called.
func (n *node) hold(prefix string) (reached <-chan struct{}, release func()) {
	at, gate := make(chan struct{}), make(chan struct{})
	n.during(prefix, func() {
		close(at)
		<-gate
	})
	free := sync.OnceFunc(func() { close(gate) })
	n.t.Cleanup(free)
	return at, free
}

// How a restart ends when the runtime refuses something.
func TestRuntimeRefuses(t *testing.T) {
	refuse := func(prefix string, code codes.Code, times int) func(*fakenode.Runtime) {
		return func(f *fakenode.Runtime) {
			f.Before = func(call string) error {
				if strings.HasPrefix(call, prefix) && times != 0 {
					times--
					return status.Error(code, "no such luck")
				}
				return nil
			}
		}
	}
	cases := []struct {
		name    string
		script  func(*fakenode.Runtime)
		want    string
		message string
		state   string
		calls   string
		sees    string // if not state
	}{
		{
			name: "create", script: refuse("CreateContainer", codes.Unknown, 1),
			want: "FAILED, app FAILED CreateFailed", message: "app: creating the new container: no such luck",
			state: "app/0 RUNNING, web/0 RUNNING", calls: "CreateContainer app/1",
		},
		{
			name: "stop", script: refuse("StopContainer app/0", codes.DeadlineExceeded, 1),
			want: "FAILED, app FAILED StopFailed", message: "app: stopping the container: no such luck",
			state: "app/0 RUNNING, web/0 RUNNING",
			calls: "CreateContainer app/1; StopContainer app/0 30s; StopContainer app/1 30s; RemoveContainer app/1",
		},
		{
			name: "start, once", script: func(f *fakenode.Runtime) { failStarts(f, 1) },
			want: "SUCCEEDED, app SUCCEEDED", state: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING",
			calls: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; RemoveContainer app/1; " +
				"CreateContainer app/1; StartContainer app/1",
		},
		{
			name: "start, always", script: func(f *fakenode.Runtime) { failStarts(f, 9) },
			want: "FAILED, app FAILED StartFailed", message: "exec: no such file or directory",
			state: "app/0 EXITED, app/1 EXITED, web/0 RUNNING",
			calls: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; RemoveContainer app/1; " +
				"CreateContainer app/1; StartContainer app/1",
		},
		{
			name: "runtime away at the stop", script: refuse("StopContainer app/0", codes.Unavailable, 2),
			want: "SUCCEEDED, app SUCCEEDED", state: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING",
			calls: "CreateContainer app/1; StopContainer app/0 30s; StopContainer app/0 30s; StopContainer app/0 " +
				"30s; StartContainer app/1",
		},
		{
			name: "runtime away at the start", script: refuse("StartContainer", codes.Unavailable, 2),
			want: "SUCCEEDED, app SUCCEEDED", state: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING",
			calls: "CreateContainer app/1; StopContainer app/0 30s; StartContainer app/1; StartContainer app/1; " +
				"StartContainer app/1",
		},
		{
			name: "removal of a stage, for a while",
			script: func(f *fakenode.Runtime) {
				var creates, removes int
				f.After = func(call string) error {
					if call == "CreateContainer app/1" && creates == 0 {
						creates++ // made, and the answer lost
						return status.Error(codes.Unavailable, "no such luck")
					}
					return nil
				}
				f.Before = func(call string) error {
					if strings.HasPrefix(call, "RemoveContainer") && removes < 2 {
						removes++
						return status.Error(codes.Unknown, "busy")
					}
					return nil
				}
			},
			want: "FAILED, app FAILED CreateFailed", message: "no such luck",
			state: "app/0 RUNNING, web/0 RUNNING",
			calls: "CreateContainer app/1; RemoveContainer app/1; RemoveContainer app/1; RemoveContainer app/1",
		},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			n.runTidied()
			n.rt.TakeCalls()
			n.rt.Set(tc.script)
			n.restart("op")
			op := n.finish("op")
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s, want %s", got, tc.want)
			}
			if !strings.Contains(op.GetMessage(), tc.message) || (tc.message == "") != (op.GetMessage() == "") {
				t.Errorf("message is %q, want %q", op.GetMessage(), tc.message)
			}
			if got := strings.Join(fakenode.Mutating(n.rt.TakeCalls()), "; "); got != tc.calls {
				t.Errorf("calls are %s\nwant      %s", got, tc.calls)
			}
			if got := n.rt.State(); got != tc.state {
				t.Errorf("runtime has %s, want %s", got, tc.state)
			}
			if got := n.sees(); got != tc.state {
				t.Errorf("kubelet sees %s, want %s", got, tc.state)
			}
			if n.engine.node.Records.Len() != strings.Count(tc.state, "/") {
				t.Errorf("%d containers are recorded", n.engine.node.Records.Len())
			}
		})
	}
}

// A runtime that answers everything but the stop must not be asked as fast as it can answer, nor
// for ever.
func TestStopIsNeverPossible(t *testing.T) {
	b := newBubble(t)
	b.run(func(t *testing.T, n *bubbleNode) {
		n.rt.Set(func(f *fakenode.Runtime) {
			f.Before = func(call string) error {
				if strings.HasPrefix(call, "StopContainer app/0") {
					return status.Error(codes.Unavailable, "ttrpc: closed")
				}
				return nil
			}
		})
		op := n.restart("op")
		if got, want := verdict(op), "FAILED, app FAILED StopFailed"; got != want {
			t.Errorf("operation ended %s, want %s", got, want)
		}
		if got, want := n.rt.State(), "app/0 RUNNING"; got != want {
			t.Errorf("runtime has %s", got)
		}
		if calls := fakenode.Mutating(n.rt.TakeCalls()); len(calls) > 20 {
			t.Errorf("%d calls", len(calls))
		}
	})
}

// A journal that cannot be written any more stops what has not stopped anything yet, and takes
// nothing away from an application that has been swapped.
func TestJournalBreaks(t *testing.T) {
	for _, tc := range []struct{ at, want, state string }{
		{"CreateContainer app/1", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"ExecSync app/0", "FAILED, app FAILED JournalError", "app/0 RUNNING, web/0 RUNNING"},
		{"StopContainer app/0", "SUCCEEDED, app SUCCEEDED", "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
		{"StartContainer app/1", "SUCCEEDED, app SUCCEEDED", "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
		{"ExecSync app/1", "SUCCEEDED, app SUCCEEDED", "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	} {
		t.Run(tc.at, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			n.during(tc.at, func() { n.must(n.engine.disk.Journal.Close()) })
			n.restart("op", func(r *opsv1.RestartRequest) {
				r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("bye"), execHook("hello")
			})
			op := n.finish("op")
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
			}
			if got := n.rt.State(); got != tc.state || n.sees() != tc.state {
				t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), tc.state)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	n := newNode(t, podOptions{metrics: reg})
	n.run()
	n.restart("good")
	n.finish("good")
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if strings.HasPrefix(call, "CreateContainer") {
				return status.Error(codes.Unknown, "no such luck")
			}
			return nil
		}
	})
	n.restart("bad")
	n.finish("bad")
	families, err := reg.Gather()
	n.must(err)
	got := map[string]float64{}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			name := f.GetName()
			for _, l := range s.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = s.GetCounter().GetValue() + s.GetGauge().GetValue() + float64(s.GetHistogram().GetSampleCount())
		}
	}
	want := map[string]float64{
		"criproxy_operations_total Restart succeeded": 1, "criproxy_operations_total Restart failed": 1,
		"criproxy_operations_active Restart pending": 0, "criproxy_operations_active Upgrade pending": 0,
		"criproxy_recorded_containers": 3, "criproxy_operation_gap_seconds Restart plain": 1,
		"criproxy_operation_phase_duration_seconds Restart pending":   2,
		"criproxy_operation_phase_duration_seconds Restart staging":   2,
		"criproxy_operation_phase_duration_seconds Restart stopping":  1,
		"criproxy_operation_phase_duration_seconds Restart starting":  1,
		"criproxy_operation_phase_duration_seconds Restart revealing": 1,
		"criproxy_gate_failures_total":                                0,
		"criproxy_journal_open":                                       1,
		"criproxy_image_overrides":                                    0,
		"criproxy_image_overrides_lost_total":                         0,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	_, err = ops.Open(t.Context(), ops.Options{StateDir: t.TempDir(), Conn: fakenode.Direct(n.rt), View: view.New(),
		Log: quiet(), Registerer: reg})
	if err == nil {
		t.Error("registered twice")
	}
}

// An operation that has finished has a span, with its phases below and what happened to its
// containers.
func TestTraces(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	n := newNode(t, podOptions{
		tracer: sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)).Tracer("test"),
	})
	n.run()
	n.restart("traced")
	op := n.finish("traced")
	var phases []string
	for _, s := range spans.GetSpans() {
		if s.Name != "Restart" {
			phases = append(phases, s.Name)
			if s.EndTime.Before(s.StartTime) {
				t.Errorf("%s ends before it begins", s.Name)
			}
			continue
		}
		var events []string
		for _, e := range s.Events {
			events = append(events, e.Name)
		}
		if got, want := strings.Join(events, ", "), "container ended, container started"; got != want {
			t.Errorf("events %q, want %q", got, want)
		}
		if !s.StartTime.Equal(op.GetCreateTime().AsTime()) || !s.EndTime.Equal(op.GetFinishTime().AsTime()) {
			t.Errorf("span from %s to %s, the operation from %s to %s", s.StartTime, s.EndTime,
				op.GetCreateTime().AsTime(), op.GetFinishTime().AsTime())
		}
	}
	if got, want := strings.Join(phases, ", "), "pending, staging, stopping, starting, revealing"; got != want {
		t.Errorf("phases %q, want %q", got, want)
	}
}

// A runtime that hangs ends the operation, not the use of the slot.
func TestRuntimeHangs(t *testing.T) {
	for _, tc := range []struct{ call, want, state string }{
		{"ListContainers", "FAILED, app FAILED RuntimeError", "app/0 RUNNING"},
		{"ContainerStatus app/0", "FAILED, app FAILED RuntimeError", "app/0 RUNNING"},
		{"ContainerStatus app/1", "SUCCEEDED, app SUCCEEDED", "app/0 EXITED, app/1 RUNNING"},
	} {
		t.Run(tc.call, func(t *testing.T) {
			newBubble(t).run(func(t *testing.T, n *bubbleNode) {
				synctest.Wait() // the start is over
				n.rt.Set(func(f *fakenode.Runtime) {
					f.Hang = func(ctx context.Context, call string) error {
						if call != tc.call {
							return nil
						}
						<-ctx.Done()
						return status.FromContextError(ctx.Err()).Err()
					}
				})
				op := n.restart("op")
				if got := verdict(op); got != tc.want {
					t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), tc.want)
				}
				if got := n.rt.State(); got != tc.state {
					t.Errorf("runtime has %s, want %s", got, tc.state)
				}
				if n.engine.node.View.Claimed(view.Slot{PodUID: podUID, Container: "app"}) {
					t.Error("the slot stays claimed")
				}
			})
		})
	}
}

func TestCancel(t *testing.T) {
	cases := []struct {
		name string
		at   string
		edit func(*opsv1.RestartRequest)
		code codes.Code
		want string
		end  string
	}{
		{name: "while staging", at: "CreateContainer app/1", want: "CANCELLED, app CANCELLED Cancelled",
			end: "app/0 RUNNING, web/0 RUNNING"},
		{
			name: "once preStop runs", at: "ExecSync",
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("bye") },
			code: codes.FailedPrecondition, want: "SUCCEEDED, app SUCCEEDED",
			end: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING",
		},
		{name: "at the stop", at: "StopContainer app/0", code: codes.FailedPrecondition,
			want: "SUCCEEDED, app SUCCEEDED", end: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
		{name: "at the start", at: "StartContainer app/1", code: codes.FailedPrecondition,
			want: "SUCCEEDED, app SUCCEEDED", end: "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			n.runTidied()
			reached, release := n.hold(tc.at)
			if tc.edit == nil {
				tc.edit = func(*opsv1.RestartRequest) {}
			}
			n.restart("op", tc.edit)
			<-reached
			answered := make(chan error, 1)
			o := n.engine.Lookup("op")
			go func() {
				_, err := n.api.CancelOperation(context.Background(),
					&opsv1.CancelOperationRequest{Uid: "op", Reason: "changed my mind"})
				answered <- err
			}()
			if tc.code == codes.OK {
				<-o.Cancelled()
				release()
			}
			if err := <-answered; status.Code(err) != tc.code {
				t.Errorf("cancel is answered %v, want %s", err, tc.code)
			}
			release()
			op := n.finish("op")
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s, want %s", got, tc.want)
			}
			if tc.code == codes.OK && op.GetMessage() != "app: changed my mind" {
				t.Errorf("message is %q", op.GetMessage())
			}
			if got := n.rt.State(); got != tc.end || n.sees() != tc.end {
				t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), tc.end)
			}
			// Of a finished operation it changes nothing.
			again, err := n.api.CancelOperation(t.Context(), &opsv1.CancelOperationRequest{Uid: "op", Reason: "late"})
			if err != nil || !proto.Equal(again, op) {
				t.Errorf("cancel of the finished one: %v, %v", again, err)
			}
		})
	}
	t.Run("in the queue", func(t *testing.T) {
		n := newNode(t, podOptions{})
		n.runTidied()
		reached, release := n.hold("StopContainer app/0")
		n.restart("first")
		<-reached
		n.restart("second")
		op, err := n.api.CancelOperation(t.Context(), &opsv1.CancelOperationRequest{Uid: "second"})
		n.must(err)
		if got, want := verdict(op), "CANCELLED, app CANCELLED Cancelled"; got != want {
			t.Errorf("operation ended %s, want %s", got, want)
		}
		if !strings.Contains(op.GetMessage(), "cancelled by in-process") {
			t.Errorf("message is %q", op.GetMessage())
		}
		release()
		if got, want := verdict(n.finish("first")), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("the first ended %s, want %s", got, want)
		}
	})
	t.Run("the caller does not wait", func(t *testing.T) {
		n := newNode(t, podOptions{}) // Run has not begun
		n.restart("op")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		op, err := n.api.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: "op"})
		if err != nil || op.GetFinishTime() != nil {
			t.Errorf("got %v, %v", op, err)
		}
		n.run()
		if got, want := verdict(n.finish("op")), "CANCELLED, app CANCELLED Cancelled"; got != want {
			t.Errorf("operation ended %s, want %s", got, want)
		}
	})
}

// The second of two operations on a slot waits, is never lost, and checks when its turn comes.
func TestTwoOperationsOnOneSlot(t *testing.T) {
	for _, tc := range []struct {
		name     string
		expected bool
		want     string
		state    string
	}{
		{"whatever runs", false, "SUCCEEDED, app SUCCEEDED",
			"app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING"},
		{"the one that ran", true, "FAILED, app FAILED ExpectedIDDiffers",
			"app/0 EXITED, app/1 RUNNING, web/0 RUNNING"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			first := n.rt.ID(t, "app/0")
			reached, release := n.hold("StopContainer app/0")
			n.restart("first")
			<-reached
			n.restart("second", func(r *opsv1.RestartRequest) {
				if tc.expected {
					r.Containers[0].ExpectedContainerId = "containerd://" + first
				}
			})
			if op := n.engine.Lookup("second").Snapshot(); op.GetPhase() != opsv1.Phase_PHASE_PENDING {
				t.Errorf("the second is %s", op.GetPhase())
			}
			release()
			if got, want := verdict(n.finish("first")), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("the first ended %s, want %s", got, want)
			}
			if got := verdict(n.finish("second")); got != tc.want {
				t.Errorf("the second ended %s, want %s", got, tc.want)
			}
			if got := n.rt.State(); got != tc.state || n.sees() != tc.state {
				t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), tc.state)
			}
		})
	}
}

func TestForceIgnoresTheExpectedID(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	n.restart("op", func(r *opsv1.RestartRequest) {
		r.Force = true
		r.Containers[0].ExpectedContainerId = "containerd://another"
	})
	if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; got != want {
		t.Errorf("operation ended %s, want %s", got, want)
	}
}

func TestSameUID(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	reached, release := n.hold("CreateContainer app/1")
	n.restart("op")
	<-reached
	// Another requester, or the UID left out, is the same command.
	if op := n.restart("op", func(r *opsv1.RestartRequest) {
		r.Requester, r.Pod.Uid = "someone else",
			""
	}); op.GetRequester() != "test" {
		t.Errorf("got another operation: %v", op)
	}
	for name, edit := range map[string]func(*opsv1.RestartRequest){
		"container": func(r *opsv1.RestartRequest) { r.Containers[0].Name = "web" },
		"pod":       func(r *opsv1.RestartRequest) { r.Pod.Name = "other" },
		"force":     func(r *opsv1.RestartRequest) { r.Force = true },
		"grace":     func(r *opsv1.RestartRequest) { r.Containers[0].GracePeriodSeconds = proto.Int64(3) },
	} {
		_, err := n.api.Restart(t.Context(), restartRequest("op", edit))
		if status.Code(err) != codes.AlreadyExists || !strings.Contains(err.Error(), "choose a new UID") {
			t.Errorf("another %s: %v, want AlreadyExists", name, err)
		}
	}
	release()
	op := n.finish("op")
	if again := n.restart("op"); !proto.Equal(again, op) {
		t.Errorf("a repeated command is answered %v, want %v", again, op)
	}
	if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
		t.Errorf("runtime has %s, want one restart", got)
	}
}

func TestSeveralContainers(t *testing.T) {
	both := func(ordered bool, names ...string) func(*opsv1.RestartRequest) {
		return func(r *opsv1.RestartRequest) {
			r.Ordered, r.Containers = ordered, nil
			for _, name := range names {
				r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: name})
			}
		}
	}
	fail := func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if call == "CreateContainer app/1" {
				return status.Error(codes.Unknown, "no such luck")
			}
			return nil
		}
	}
	for _, tc := range []struct {
		name   string
		edit   func(*opsv1.RestartRequest)
		script func(*fakenode.Runtime)
		want   string
		state  string
	}{
		{"at once", both(false, "app", "web"), nil, "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
			"app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING"},
		{"at once, one fails", both(false, "app", "web"), fail, "FAILED, app FAILED CreateFailed, web SUCCEEDED",
			"app/0 RUNNING, web/0 EXITED, web/1 RUNNING"},
		{"ordered", both(true, "web", "app"), nil, "SUCCEEDED, web SUCCEEDED, app SUCCEEDED",
			"app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING"},
		{"ordered, the first fails", both(true, "app", "web"), fail,
			"FAILED, app FAILED CreateFailed, web CANCELLED EarlierContainerFailed", "app/0 RUNNING, web/0 RUNNING"},
		{"ordered, the last fails", both(true, "web", "app"), fail, "FAILED, web SUCCEEDED, app FAILED CreateFailed",
			"app/0 RUNNING, web/0 EXITED, web/1 RUNNING"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			n.runTidied()
			if tc.script != nil {
				n.rt.Set(tc.script)
			}
			end := n.relist()
			n.restart("op", tc.edit)
			op := n.finish("op")
			end()
			if got := verdict(op); got != tc.want {
				t.Errorf("operation ended %s, want %s", got, tc.want)
			}
			if got := n.rt.State(); got != tc.state || n.sees() != tc.state {
				t.Errorf("runtime has %s, kubelet sees %s, want %s", got, n.sees(), tc.state)
			}
		})
	}
}

func TestRestartIsRefused(t *testing.T) {
	cases := []struct {
		name    string
		edit    func(*opsv1.RestartRequest)
		prepare func(*node)
		code    codes.Code
		reason  string
		message string
	}{
		{name: "unknown pod",
			edit: func(r *opsv1.RestartRequest) { r.Pod = &opsv1.PodRef{Namespace: "default", Name: "nope"} },
			code: codes.NotFound, reason: opsv1.ReasonNotFound, message: "no pod default/nope runs on this node"},
		{name: "another UID", edit: func(r *opsv1.RestartRequest) { r.Pod.Uid = "later" }, code: codes.NotFound,
			reason: opsv1.ReasonNotFound, message: "no pod default/shop with UID later"},
		{name: "unknown container", edit: func(r *opsv1.RestartRequest) { r.Containers[0].Name = "nope" },
			code: codes.NotFound, reason: opsv1.ReasonNotFound, message: `no container "nope"; running are: `},
		{name: "expected ID differs",
			edit: func(r *opsv1.RestartRequest) { r.Containers[0].ExpectedContainerId = "containerd://nope" },
			code: codes.FailedPrecondition, reason: opsv1.ReasonExpectedIDDiffers, message: "not nope"},
		{name: "exited", prepare: func(n *node) { n.rt.Exit(n.t, "app/0", 1) }, code: codes.FailedPrecondition,
			reason: opsv1.ReasonContainerNotRunning, message: "not running (exited)"},
		{name: "pod stopped", prepare: func(n *node) {
			_, err := n.kubelet.StopPodSandbox(context.Background(),
				&runtimeapi.StopPodSandboxRequest{PodSandboxId: n.sandbox})
			n.must(err)
		}, code: codes.FailedPrecondition, reason: opsv1.ReasonPodStopping, message: "going away"},
		{name: "runtime away", prepare: func(n *node) {
			n.rt.Set(
				func(f *fakenode.Runtime) {
					f.Before = func(string) error {
						return status.Error(codes.Unavailable,
							"gone")
					}
				})
		}, code: codes.Unavailable, message: "gone"},
		{name: "runtime broken", prepare: func(n *node) {
			n.rt.Set(func(f *fakenode.Runtime) {
				f.Before = func(string) error { return status.Error(codes.Unknown, "odd") }
			})
		}, code: codes.Internal, message: "asking the runtime: "},
		{name: "state directory gone", prepare: func(n *node) { n.must(n.engine.disk.Journal.Close()) },
			code: codes.Internal, message: "nothing was done"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			if tc.prepare != nil {
				tc.prepare(n)
			}
			if tc.edit == nil {
				tc.edit = func(*opsv1.RestartRequest) {}
			}
			_, err := n.api.Restart(t.Context(), restartRequest("op", tc.edit))
			if status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.message) {
				t.Errorf("got %v, want %s: %s", err, tc.code, tc.message)
			}
			reason := ""
			for _, d := range status.Convert(err).Details() {
				if info, ok := d.(*errdetails.ErrorInfo); ok {
					reason = info.GetReason()
				}
			}
			if reason != tc.reason {
				t.Errorf("reason is %q, want %q", reason, tc.reason)
			}
			if n.engine.Lookup("op") != nil {
				t.Error("it is in the journal all the same")
			}
		})
	}
	t.Run("too many", func(t *testing.T) {
		n := newNode(t, podOptions{})
		for i := range ops.MaxActive {
			n.engine.Add(operation.New(operation.Command{
				Restart: &opsv1.RestartRequest{Uid: strings.Repeat("x", i+1)},
			}, nil, nil))
		}
		_, err := n.api.Restart(t.Context(), restartRequest("op"))
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		n := newNode(t, podOptions{})
		n.engine.StopAccepting()
		_, err := n.api.Restart(t.Context(), restartRequest("op"))
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
}

// Finished operations are forgotten after their time, in memory and on disk.
func TestFinishedOperationsExpire(t *testing.T) {
	n := newNode(t, podOptions{})
	n.run()
	n.restart("old")
	n.finish("old")
	n.restart("new")
	n.finish("new")
	o := n.engine.Lookup("old")
	o.Change(func(op *opsv1.Operation) {
		op.FinishTime = timestamppb.New(time.Now().Add(-ops.KeepFinished - time.Second))
	})
	n.restart("latest")
	n.finish("latest")
	_, err := n.api.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: "old"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("the old one is answered %v", err)
	}
	op, err := n.api.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: "new"})
	if err != nil || verdict(op) != "SUCCEEDED, app SUCCEEDED" {
		t.Errorf("the new one is answered %v, %v", op, err)
	}
	// The next process knows the same.
	state := n.copyState()
	n.stop()
	n.ran.Wait()
	n.boot(state)
	list, err := n.api.ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	n.must(err)
	var uids []string
	for _, op := range list.GetOperations() {
		uids = append(uids, op.GetUid())
	}
	if got := strings.Join(uids, " "); got != "latest new" {
		t.Errorf("the journal has %q, want the younger ones, newest first", got)
	}
	info, err := n.api.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	if err != nil || info.GetCounters().GetOperationsSucceeded() != 2 || info.GetCounters().
		GetRecordedContainers() == 0 || len(info.GetActiveSlots()) != 0 {
		t.Errorf("node info is %v, %v", info, err)
	}
}
