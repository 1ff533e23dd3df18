// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// bubble runs an engine where time passes only when nothing else can happen: no sockets, so
// the runtime is called directly and there is no kubelet.
type bubble struct {
	t           *testing.T
	annotations map[string]string
}

type bubbleNode struct {
	t      *testing.T
	rt     *fakenode.Runtime
	engine *engine
}

func newBubble(t *testing.T) *bubble { return &bubble{t: t, annotations: map[string]string{}} }

func (b *bubble) run(f func(t *testing.T, n *bubbleNode)) {
	dir := b.t.TempDir()
	synctest.Test(b.t, func(t *testing.T) {
		log := logrus.New()
		log.SetOutput(io.Discard)
		n := &bubbleNode{t: t, rt: fakenode.New()}
		var err error
		n.engine, err = open(ops.Options{StateDir: dir, Conn: fakenode.Direct(n.rt), View: view.New(),
			Log: log, LegacyLogDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		unsynced(n.engine.disk.Journal)
		shape := &node{t: t, dir: dir, rt: n.rt}
		sb, err := n.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: shape.sandboxConfig()})
		if err != nil {
			t.Fatal(err)
		}
		cfg := shape.containerConfig("app", 0)
		for k, v := range b.annotations {
			cfg.Annotations[k] = v
		}
		req := &runtimeapi.CreateContainerRequest{PodSandboxId: sb.GetPodSandboxId(), Config: cfg,
			SandboxConfig: shape.sandboxConfig()}
		made, err := n.rt.CreateContainer(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		n.engine.node.Records.Created(made.GetContainerId(), raw)
		if _, err := n.rt.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: made.GetContainerId()}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var ran sync.WaitGroup
		ran.Go(func() {
			if err := n.engine.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		f(t, n)
		cancel()
		ran.Wait()
		if err := n.engine.Close(); err != nil {
			t.Error(err)
		}
	})
}

// restart restarts app and returns the operation once it has ended.
func (n *bubbleNode) restart(uid string, edit ...func(*opsv1.RestartRequest)) *opsv1.Operation {
	n.t.Helper()
	o, err := n.engine.Submit(operation.RestartCommand(restartRequest(uid, edit...), nil), podRef())
	if err != nil {
		n.t.Fatal(err)
	}
	for {
		op, changed := o.Watch()
		if op.GetFinishTime() != nil {
			return op
		}
		select {
		case <-changed:
		case <-time.After(24 * time.Hour):
			n.t.Fatalf("operation is still %v", op)
		}
	}
}

// preStop and stop share the grace, as kubelet's do.
func TestGrace(t *testing.T) {
	sleeps := func(d time.Duration) func(*fakenode.Runtime) {
		return func(f *fakenode.Runtime) {
			f.OnExec = func(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
				limit := time.Duration(r.GetTimeout()) * time.Second
				if limit > 0 && limit < d {
					d = limit
				}
				if err := crinode.Sleep(ctx, d); err != nil {
					return nil, err
				}
				if d == limit {
					return nil, status.Error(codes.DeadlineExceeded, "timed out")
				}
				return &runtimeapi.ExecSyncResponse{}, nil
			}
		}
	}
	sleepHook := func(s int64) *opsv1.Hook {
		return &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: s}}}
	}
	cases := []struct {
		name        string
		annotations map[string]string
		grace       *int64
		hook        *opsv1.Hook
		script      func(*fakenode.Runtime)
		calls       string // exec and stop
		warning     string
		took        time.Duration // until the stop
	}{
		{name: "pod's own", calls: "StopContainer app/0 30s"},
		{name: "request's", grace: proto.Int64(7), calls: "StopContainer app/0 7s"},
		{name: "none", grace: proto.Int64(0), hook: execHook("bye"), calls: "StopContainer app/0 2s"},
		{name: "one second", grace: proto.Int64(1), calls: "StopContainer app/0 2s"},
		{name: "not told", annotations: map[string]string{criclone.AnnotationTerminationGrace: ""},
			calls: "StopContainer app/0 30s"},
		{name: "garbage", annotations: map[string]string{criclone.AnnotationTerminationGrace: "soon"},
			calls: "StopContainer app/0 30s"},
		{name: "negative", annotations: map[string]string{criclone.AnnotationTerminationGrace: "-1"},
			calls: "StopContainer app/0 30s"},
		{name: "exec", hook: execHook("bye"), script: sleeps(12 * time.Second),
			calls: "ExecSync app/0 bye 30s; StopContainer app/0 18s", took: 12 * time.Second},
		{name: "exec too long", hook: execHook("bye"), script: sleeps(time.Hour),
			calls: "ExecSync app/0 bye 30s; StopContainer app/0 2s", warning: "preStop hook", took: 30 * time.Second},
		{name: "sleep", hook: sleepHook(25), calls: "StopContainer app/0 5s", took: 25 * time.Second},
		{name: "sleep of all of it", hook: sleepHook(29), calls: "StopContainer app/0 2s", took: 29 * time.Second},
		{name: "sleep too long", hook: sleepHook(60), grace: proto.Int64(10), calls: "StopContainer app/0 2s",
			warning: "did not end within the grace period of 10s", took: 10 * time.Second},
		{
			name: "exec fails", hook: execHook("bye"),
			script: func(f *fakenode.Runtime) {
				f.OnExec = func(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
					return &runtimeapi.ExecSyncResponse{ExitCode: 3, Stderr: []byte("no way\n")}, nil
				}
			},
			calls: "ExecSync app/0 bye 30s; StopContainer app/0 30s", warning: `command ["bye"] exited with 3: no way`,
		},
		{name: "recorded",
			annotations: map[string]string{criclone.AnnotationPreStop: `{"exec":{"command":["sh","-c","x"]}}`},
			calls:       "ExecSync app/0 sh -c x 30s; StopContainer app/0 30s"},
		{name: "recorded sleep", annotations: map[string]string{criclone.AnnotationPreStop: `{"sleep":{"seconds":4}}`},
			calls: "StopContainer app/0 26s", took: 4 * time.Second},
		{name: "request's hook wins", hook: sleepHook(1),
			annotations: map[string]string{criclone.AnnotationPreStop: `{"sleep":{"seconds":4}}`},
			calls:       "StopContainer app/0 29s", took: time.Second},
		{name: "recorded nonsense", annotations: map[string]string{criclone.AnnotationPreStop: `{`},
			calls: "StopContainer app/0 30s", warning: criclone.AnnotationPreStop},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			b := newBubble(t)
			b.annotations = tc.annotations
			b.run(func(t *testing.T, n *bubbleNode) {
				var stopped time.Time
				n.rt.Set(func(f *fakenode.Runtime) {
					if tc.script != nil {
						tc.script(f)
					}
					f.Before = func(call string) error {
						if strings.HasPrefix(call, "StopContainer") {
							stopped = time.Now()
						}
						return nil
					}
				})
				begun := time.Now()
				op := n.restart("op", func(r *opsv1.RestartRequest) {
					r.Containers[0].GracePeriodSeconds, r.Containers[0].PreStop = tc.grace, tc.hook
				})
				if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
					t.Errorf("operation ended %s (%s)", got, op.GetMessage())
				}
				var calls []string
				for _, c := range n.rt.TakeCalls() {
					if strings.HasPrefix(c, "ExecSync") || strings.HasPrefix(c, "StopContainer") {
						calls = append(calls, c)
					}
				}
				if got := strings.Join(calls, "; "); got != tc.calls {
					t.Errorf("calls are %s, want %s", got, tc.calls)
				}
				if got := stopped.Sub(begun); got != tc.took {
					t.Errorf("stopped after %s, want %s", got, tc.took)
				}
				w := strings.Join(op.GetContainers()[0].GetWarnings(), "; ")
				if (w == "") != (tc.warning == "") || !strings.Contains(w, tc.warning) {
					t.Errorf("warnings are %q, want %q", w, tc.warning)
				}
				if got := op.GetContainers()[0].GetPreStopFailed(); got != (tc.warning != "") {
					t.Errorf("the hook failed: %v", got)
				}
			})
		})
	}
}

// The engine waits for a runtime that is away, with longer and longer pauses.
func TestRuntimeIsAwayAtFirst(t *testing.T) {
	newBubble(t).run(func(t *testing.T, n *bubbleNode) {
		synctest.Wait()
		n.rt.TakeCalls()
		back := time.Now().Add(time.Minute)
		n.rt.Set(func(f *fakenode.Runtime) {
			f.Before = func(string) error {
				if time.Now().Before(back) {
					return status.Error(codes.Unavailable, "gone")
				}
				return nil
			}
		})
		op := n.restart("op")
		if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
			t.Errorf("operation ended %s (%s)", got, op.GetMessage())
		}
		asked := 0
		for _, c := range n.rt.TakeCalls() {
			if c == "Version" {
				asked++
			}
		}
		if asked < 30 || asked > 100 {
			t.Errorf("asked %d times in a minute", asked)
		}
	})
}

// unsynced has writes not wait for the disk, for tests.
func unsynced(j *store.Journal) {
	if db, err := j.DB(); err == nil {
		db.NoSync = true
	}
}
