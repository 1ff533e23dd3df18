// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

func stopRequest(id string, grace int64) *runtimeapi.StopContainerRequest {
	return &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace}
}

// TestKubeletTakesBack stops the pod as kubelet does, at different points of a restart.
func TestKubeletTakesBack(t *testing.T) {
	for _, tc := range []struct {
		name    string
		spec    spec
		restart *opsv1.ContainerRestart
		phase   opsv1.Phase
	}{
		{name: "in preStop", spec: spec{command: looping, preStop: `{"sleep":{"seconds":60}}`, grace: 60},
			restart: &opsv1.ContainerRestart{}, phase: opsv1.Phase_PHASE_STOPPING},
		{name: "in postStart", spec: spec{command: looping}, restart: &opsv1.ContainerRestart{PostStart: sleepHook(60)},
			phase: opsv1.Phase_PHASE_STARTING},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := startNode(t)
			p := n.runPod(t)
			tc.spec.name, tc.restart.Name = "app", "app"
			app := p.run(t, tc.spec)
			uid := n.begin(t, p, &opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{tc.restart}})
			n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == tc.phase })
			began := time.Now()
			_, err := n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
			must(t, err)
			if d := time.Since(began); d > 20*time.Second {
				t.Errorf("kubelet waited %s", d)
			}
			// What kubelet finds when its call returns.
			if running, all := p.running(t, n.direct, "app"); running != 0 || all != 1 {
				t.Errorf("%d running of %d", running, all)
			}
			if got := n.status(t, app).GetState(); got != runtimeapi.ContainerState_CONTAINER_EXITED {
				t.Errorf("incumbent is shown %s", got)
			}
			op := n.wait(t, uid)
			if op.GetPhase() != opsv1.Phase_PHASE_FAILED || op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
				t.Errorf("operation: %v", op)
			}
		})
	}
}

// TestKubeletJoins stops the incumbent as kubelet does after a failed probe, at different points of
// a restart, and makes the next container: kubelet's grace counts where it is the shorter one, and
// what it gets is the successor.
func TestKubeletJoins(t *testing.T) {
	stubborn := []string{"sh", "-c", `trap 'echo asked-to-stop' TERM; echo started; while :; do sleep 0.05; done`}
	for _, tc := range []struct {
		name    string
		spec    spec
		restart *opsv1.ContainerRestart
		phase   opsv1.Phase
		asked   bool // wait until the incumbent has been asked to stop
	}{
		{
			name: "in preStop",
			spec: spec{command: looping,
				preStop: `{"exec":{"command":["sh","-c","echo asked-to-stop > /proc/1/fd/1; sleep 60"]}}`, grace: 60},
			restart: &opsv1.ContainerRestart{}, phase: opsv1.Phase_PHASE_STOPPING, asked: true,
		},
		{name: "while stopping", spec: spec{command: stubborn, grace: 60}, restart: &opsv1.ContainerRestart{},
			phase: opsv1.Phase_PHASE_STOPPING, asked: true},
		{name: "in postStart", spec: spec{command: looping}, restart: &opsv1.ContainerRestart{PostStart: sleepHook(3)},
			phase: opsv1.Phase_PHASE_STARTING},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := startNode(t)
			p := n.runPod(t)
			tc.spec.name, tc.restart.Name = "app", "app"
			app := p.runSpec(t, tc.spec)
			uid := n.begin(t, p, &opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{tc.restart}})
			n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == tc.phase })
			if tc.asked {
				eventually(t, "the incumbent has been asked to stop",
					func() bool { return strings.Contains(p.log(t, "app", 0), "asked-to-stop") })
			}
			began := time.Now()
			_, err := n.StopContainer(t.Context(), stopRequest(app, 2))
			must(t, err)
			if d := time.Since(began); d > 20*time.Second {
				t.Errorf("kubelet waited %s", d)
			}
			// What kubelet finds when its call returns.
			if running, all := p.running(t, n.kubelet, "app"); running != 1 || all != 2 {
				t.Errorf("%d running of %d", running, all)
			}
			if got := n.direct.status(t, app).GetState(); got != runtimeapi.ContainerState_CONTAINER_EXITED {
				t.Errorf("incumbent is %s", got)
			}
			successor := p.create(t, tc.spec, 1)
			op := n.wait(t, uid)
			if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED ||
				c.GetSuccessorId() != successor || len(c.GetWarnings()) == 0 {
				t.Errorf("kubelet was given %s: %v", successor, op)
			}
			if running, all := p.running(t, n.direct, "app"); running != 1 || all != 2 {
				t.Errorf("%d running of %d", running, all)
			}
		})
	}
}

// create creates and starts an attempt as kubelet does, and returns its ID.
func (p *pod) create(t testing.TB, s spec, attempt int) string {
	t.Helper()
	resp, err := p.k.CreateContainer(t.Context(), p.withSpec(t, s, attempt))
	must(t, err)
	_, err = p.k.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()})
	must(t, err)
	return resp.GetContainerId()
}

func sleepHook(seconds int64) *opsv1.Hook {
	return &opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: seconds}}}
}

func execHook(command ...string) *opsv1.Hook {
	return &opsv1.Hook{Action: &opsv1.Hook_Exec{Exec: &opsv1.ExecAction{Command: command}}}
}

// TestMasked looks at what calls on the incumbent answer while it stops.
func TestMasked(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	// It waits for a word in its termination log, so that the mask lasts as long as the test takes.
	hook := execHook("sh", "-c", "until grep -q done /dev/termination-log; do sleep 0.05; done")
	uid := n.begin(t, p, &opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app", PostStart: hook}}})
	op := n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_STARTING })
	successor := op.GetContainers()[0].GetSuccessorId()
	word := n.direct.status(t, successor).GetMounts()[0].GetHostPath()

	if got := n.status(t, app); got.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING ||
		got.GetFinishedAt() != 0 || got.GetExitCode() != 0 || got.GetReason() != "" {
		t.Errorf("incumbent is shown as %v", got)
	}
	if got := n.direct.status(t, app).GetState(); got != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("incumbent is %s in truth", got)
	}
	ctx := t.Context()
	for what, code := range map[string]codes.Code{
		"status": status.Code(
			second(n.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: successor}))),
		"stats": status.Code(second(n.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: successor}))),
		"exec": status.Code(
			second(n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: successor, Cmd: []string{"true"}}))),
		"start": status.Code(second(n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: successor}))),
	} {
		if code != codes.NotFound {
			t.Errorf("%s of the hidden successor: %s", what, code)
		}
	}
	if code := status.Code(
		second(n.ExecSync(ctx,
			&runtimeapi.ExecSyncRequest{ContainerId: app, Cmd: []string{"true"}}))); code != codes.Unavailable {
		t.Errorf("exec probe of the masked incumbent: %s", code)
	}
	if _, err := n.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: app}); err != nil {
		t.Errorf("log rotation of the masked incumbent: %v", err)
	}
	_, err := n.UpdateContainerResources(ctx,
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: app,
			Linux: &runtimeapi.LinuxContainerResources{CpuShares: 333}})
	must(t, err)
	must(t, os.WriteFile(word, []byte("done\n"), 0o600)) // as it is there, its mode stays
	if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	if got := n.status(t, successor).GetResources().GetLinux().GetCpuShares(); got != 333 {
		t.Errorf("the successor has %d CPU shares", got)
	}
	// A later clone has them too.
	op = n.restart(t, p, restartOf("app"))
	if got := n.status(t, op.GetContainers()[0].GetSuccessorId()).GetResources().GetLinux().GetCpuShares(); got != 333 {
		t.Errorf("the next successor has %d CPU shares", got)
	}
}

func second[T any](_ T, err error) error { return err }

// TestHooks runs every kind of hook.
func TestHooks(t *testing.T) {
	n := startNode(t)
	var hits atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hook" && r.Header.Get("X-Hook") == "yes" {
			hits.Add(1)
		}
		if r.URL.Path == "/bad" {
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	defer server.Close()
	host, port, _ := strings.Cut(strings.TrimPrefix(server.URL, "http://"), ":")
	httpGet := `{"httpGet":{"path":"/hook","host":"` + host +
		`","port":"web","httpHeaders":[{"name":"X-Hook","value":"yes"}]}}`
	ports := `[{"name":"web","containerPort":` + port + `}]`

	for _, tc := range []struct {
		name  string
		spec  spec
		post  *opsv1.Hook
		check func(t *testing.T, op *opsv1.Operation, p *pod, took time.Duration)
	}{
		{
			name: "preStop exec",
			spec: spec{preStop: `{"exec":{"command":["sh","-c","echo from-hook > /proc/1/fd/1"]}}`},
			check: func(t *testing.T, _ *opsv1.Operation, p *pod, _ time.Duration) {
				p.logs(t, "app", 0, "from-hook") // it ran in the incumbent
			},
		},
		{
			name: "preStop httpGet with a named port", spec: spec{preStop: httpGet, ports: ports},
			check: func(t *testing.T, op *opsv1.Operation, _ *pod, _ time.Duration) {
				if hits.Load() != 1 || len(op.GetContainers()[0].GetWarnings()) > 0 {
					t.Errorf("%d hits, %v", hits.Load(), op)
				}
			},
		},
		{
			name: "preStop sleep", spec: spec{preStop: `{"sleep":{"seconds":1}}`},
			check: func(t *testing.T, _ *opsv1.Operation, _ *pod, took time.Duration) {
				if took < time.Second {
					t.Errorf("took only %s", took)
				}
			},
		},
		{
			name: "preStop longer than the grace", spec: spec{preStop: `{"sleep":{"seconds":60}}`, grace: 1},
			check: func(t *testing.T, op *opsv1.Operation, _ *pod, _ time.Duration) {
				if w := op.GetContainers()[0].GetWarnings(); len(w) != 1 || !strings.Contains(w[0], "grace period") {
					t.Errorf("warnings: %q", w)
				}
			},
		},
		{
			name: "preStop fails", spec: spec{preStop: `{"exec":{"command":["sh","-c","echo why; exit 3"]}}`},
			check: func(t *testing.T, op *opsv1.Operation, _ *pod, _ time.Duration) {
				if w := op.GetContainers()[0].GetWarnings(); len(w) != 1 ||
					!strings.Contains(w[0], "exited with 3: why") {
					t.Errorf("warnings: %q", w)
				}
			},
		},
		{
			name: "postStart exec", post: execHook("sh", "-c", "echo from-post > /proc/1/fd/1"),
			check: func(t *testing.T, _ *opsv1.Operation, p *pod, _ time.Duration) {
				p.logs(t, "app", 1, "from-post") // it ran in the successor
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := n.runPod(t)
			tc.spec.name, tc.spec.command = "app", looping
			p.run(t, tc.spec)
			op := n.restart(t, p,
				&opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app", PostStart: tc.post}}})
			if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Fatalf("operation: %v", op)
			}
			tc.check(t, op, p, op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime()))
		})
	}
	t.Run("postStart fails", func(t *testing.T) {
		p := n.runPod(t)
		p.run(t, spec{name: "app", command: looping})
		op := n.restart(t, p,
			&opsv1.RestartRequest{Containers: []*opsv1.ContainerRestart{{Name: "app", PostStart: execHook("false")}}})
		if c := op.GetContainers()[0]; c.GetReason() != "PostStartHookFailed" {
			t.Fatalf("operation: %v", op)
		}
		// Both are shown, exited: kubelet's policy is in charge.
		if running, all := p.running(t, n.kubelet, "app"); running != 0 || all != 2 {
			t.Errorf("%d running of %d", running, all)
		}
	})
}

// TestRefusals are commands that are refused before anything is done.
func TestRefusals(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	done := p.run(t, spec{name: "done", command: []string{"true"}})
	eventually(t, "container done has exited", func() bool {
		return n.status(t, done).GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	here := &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
	for _, tc := range []struct {
		name string
		pod  *opsv1.PodRef
		c    *opsv1.ContainerRestart
		code codes.Code
		text string
	}{
		{"unknown pod", &opsv1.PodRef{Namespace: "default", Name: "nobody"}, &opsv1.ContainerRestart{Name: "app"},
			codes.NotFound, "no pod default/nobody runs on this node"},
		{"pod of another UID", &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: "other"},
			&opsv1.ContainerRestart{Name: "app"}, codes.NotFound, "with UID other"},
		{"unknown container", here, &opsv1.ContainerRestart{Name: "nope"}, codes.NotFound,
			`has no container "nope"; running are: app`},
		{"exited container", here, &opsv1.ContainerRestart{Name: "done"}, codes.FailedPrecondition,
			"is not running (exited)"},
		{"expected ID", here, &opsv1.ContainerRestart{Name: "app", ExpectedContainerId: "containerd://0123"},
			codes.FailedPrecondition, "is " + app + " now, not 0123"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := n.ops.Restart(t.Context(),
				&opsv1.RestartRequest{Uid: "refused", Pod: tc.pod, Containers: []*opsv1.ContainerRestart{tc.c}})
			if status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error: %v", err)
			}
		})
	}
	list, err := n.ops.ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	must(t, err)
	if len(list.GetOperations()) != 0 {
		t.Errorf("refused commands left %v", list)
	}
}

// TestBusySlot sends a second restart while the first runs: it waits, then runs.
func TestBusySlot(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	p.run(t, spec{name: "app", command: looping, preStop: `{"sleep":{"seconds":1}}`})
	first := n.begin(t, p, restartOf("app"))
	second := n.begin(t, p, restartOf("app"))
	third := n.begin(t, p, restartOf("app"))
	op, err := n.ops.CancelOperation(t.Context(), &opsv1.CancelOperationRequest{Uid: third, Reason: "no longer wanted"})
	must(t, err)
	if op.GetPhase() != opsv1.Phase_PHASE_CANCELLED || !strings.Contains(op.GetMessage(), "no longer wanted") {
		t.Errorf("cancelled operation: %v", op)
	}
	for i, uid := range []string{first, second} {
		op := n.wait(t, uid)
		if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetContainers()[0].GetAttempt() != uint32(i+1) {
			t.Errorf("operation %d: %v", i, op)
		}
	}
	if _, err := n.ops.Restart(t.Context(),
		&opsv1.RestartRequest{Uid: first, Pod: &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid},
			Containers: []*opsv1.ContainerRestart{{Name: "other"}}}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("same UID, another request: %v", err)
	}
}

// TestOlderThanProxy restarts a container that was made before the proxy looked.
func TestOlderThanProxy(t *testing.T) {
	n := startNode(t)
	direct := dial(t, bed.runtime, bed.dir)
	p := direct.runPod(t)
	old := p.run(t, spec{name: "app", command: looping, env: map[string][]byte{"RAW": []byte("plain")}})
	p.k = n.kubelet
	op := n.restart(t, p, restartOf("app"))
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetContainers()[0].GetIncumbentId() != old {
		t.Fatalf("operation: %v", op)
	}
	eventually(t, "the new process says what the old one said",
		func() bool { return started(p.log(t, "app", 1)) == "plain" })
}

// TestLateStop stops the incumbent after the reveal, as a kubelet does that decided so before.
// After a failed liveness probe nothing more comes of it; when the pod goes away, what runs in its
// place is asked to stop before the sandbox is.
func TestLateStop(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	side := p.run(t, spec{name: "side", command: looping})
	var last string
	for i := range 2 {
		last = n.restart(t, p, restartOf("app")).GetContainers()[0].GetSuccessorId()
		p.began(t, "app", i+1)
	}
	unasked := n.restart(t, p, restartOf("side")).GetContainers()[0].GetSuccessorId()
	_, err := n.StopContainer(t.Context(), stopRequest(app, 5))
	must(t, err)
	if got := n.status(t, last).GetState(); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container in its place is %s", got)
	}
	_, err = n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	must(t, err)
	if got := n.status(t, last); got.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED ||
		got.GetExitCode() != 7 {
		t.Errorf("the container in its place was killed: %v", got)
	}
	if got := n.status(t, unasked); got.GetExitCode() == 7 {
		t.Errorf("a container whose incumbent %s kubelet did not stop was asked to stop: %v", side, got)
	}
}

// TestStrays leaves a staged container that no operation knows, as a create does that was
// cut off together with the proxy: the next process removes it, and touches no other.
func TestStrays(t *testing.T) {
	direct := dial(t, bed.runtime, bed.dir)
	p := direct.runPod(t)
	app := p.run(t, spec{name: "app", command: looping})
	stray := p.request(t, spec{name: "app", command: looping}, 1)
	stray.Config.Annotations[view.StagedAnnotation] = "unknown"
	_, err := direct.CreateContainer(t.Context(), stray)
	must(t, err)
	other := p.request(t, spec{name: "other", command: looping}, 0)
	_, err = direct.CreateContainer(t.Context(), other)
	must(t, err)
	n := startNode(t)
	eventually(t, "the stray is gone", func() bool { _, all := p.running(t, n.kubelet, "app"); return all == 1 })
	if got := n.status(t, app).GetState(); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container of the slot is %s", got)
	}
	if _, all := p.running(t, n.kubelet, "other"); all != 1 {
		t.Error("a container that kubelet created is gone")
	}
}
