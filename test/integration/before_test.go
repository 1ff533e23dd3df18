// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// commitBefore is the last commit before the campaign of docs/adr/0004. Nodes that run that version
// are upgraded while operations are in progress, so its journal, its records and its messages
// between two processes must be read.
const commitBefore = "ba6d0ca7a197039ee1bbed2c7ae29d8cebd8d0bf"

// binaryBefore builds that version of cri-proxy with failpoints, once.
var binaryBefore = sync.OnceValues(func() (string, error) {
	path := filepath.Join(bed.dir, "cri-proxy-before")
	return path, testbed.BuildCommitWithFailpoints(context.Background(), commitBefore, path)
})

// restartTest is a restart that one version begins and another one ends.
type restartTest struct {
	pod       *pod
	app, side string
	seen      *relist
}

// pods runs a pod whose container app is about to be restarted.
func (r *restartTest) pods(t *testing.T, n *node) {
	t.Helper()
	r.pod = n.runPod(t)
	hook := `{"exec":{"command":["sh","-c","echo hook >> /proc/1/fd/1"]}}`
	r.app = r.pod.run(t, spec{name: "app", command: looping, preStop: hook})
	r.side = r.pod.run(t, spec{name: "side", command: looping})
}

// judge checks that the restart has succeeded once, and that nothing is left of it.
func (r *restartTest) judge(t *testing.T, n *node, op *opsv1.Operation) {
	t.Helper()
	if bad := r.seen.stop(); len(bad) > 0 {
		t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
	}
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	c := op.GetContainers()[0]
	if c.GetIncumbentId() != r.app || c.GetAttempt() != 1 {
		t.Errorf("operation: %v, want the end of %s", op, r.app)
	}
	for _, k := range []*kubelet{n.kubelet, n.direct} {
		if running, all := r.pod.running(t, k, "app"); running != 1 || all != 2 {
			t.Errorf("%d running of %d", running, all)
		}
	}
	if got := n.status(t, c.GetSuccessorId()); got.GetMetadata().GetAttempt() != 1 {
		t.Errorf("new container: %v", got)
	}
	if running, all := r.pod.running(t, n.direct, "side"); running != 1 || all != 1 {
		t.Errorf("neighbour: %d running of %d", running, all)
	}
	r.pod.began(t, "app", 1)
	if hooks := strings.Count(r.pod.log(t, "app", 0), "hook"); hooks < 1 {
		t.Error("the preStop hook has not run")
	}
	if begins := strings.Count(r.pod.log(t, "app", 1), "started"); begins != 1 {
		t.Errorf("the new container has begun %d times", begins)
	}
	// The slot is free: another restart goes through.
	again := n.restart(t, r.pod, restartOf("app"))
	if again.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || again.GetContainers()[0].GetAttempt() != 2 {
		t.Errorf("another restart: %v", again)
	}
}

// TestVersionBeforeIsKilled kills the version before at every step of a restart. The checkout's
// version starts on the state that is left, and ends the restart. No test of this file may run
// beside another one: a process that starts removes the staged containers that its own journal does
// not have, and a node has one journal.
func TestVersionBeforeIsKilled(t *testing.T) {
	points := append([]string{"stage"}, stopFirst...)
	for _, point := range append(points, "done") {
		t.Run(point, func(t *testing.T) {
			n := startBuild(t, binaryBefore, "restart."+point)
			var r restartTest
			r.pods(t, n.node)
			req := restartOf("app")
			req.Uid = "before-" + point
			req.Pod = &opsv1.PodRef{Namespace: "default", Name: r.pod.name, Uid: r.pod.uid}
			_, _ = n.ops.Restart(t.Context(), req) // the process may end before it answers
			n.died(t)

			n.build = failpointBinary
			n.start(t, "")
			r.seen = r.pod.watch("app")
			r.judge(t, n.node, n.wait(t, req.GetUid()))
		})
	}
}

// TestAnotherVersionTakesOver has a process of the checkout's version take over from the version
// before, as cri-proxy self-update does, while a restart is at any step; and the other way round,
// as cri-proxy self-update --back does.
func TestAnotherVersionTakesOver(t *testing.T) {
	type test struct {
		from, to  build
		order     opsv1.Order
		failpoint string
	}
	tests := map[string]test{}
	for _, step := range stopFirst {
		tests[step] = test{from: binaryBefore, to: failpointBinary, failpoint: step}
	}
	for _, step := range []string{"running", "ready", "stop"} {
		tests["start first, "+step] = test{
			from: binaryBefore, to: failpointBinary, order: opsv1.Order_ORDER_START_FIRST, failpoint: step,
		}
	}
	for _, step := range []string{"staged", "stop", "running", "reveal"} {
		tests["back, "+step] = test{from: failpointBinary, to: binaryBefore, failpoint: step}
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			hold := &pause{t: t, dir: shortDir(t)}
			s := startInstancesOf(t, tt.from, "restart."+tt.failpoint+"=pause:"+hold.dir)
			t.Cleanup(hold.release)
			var r restartTest
			r.pods(t, s.node)
			r.seen = r.pod.watch("app")
			req := restartOf("app")
			req.Containers[0].Order = tt.order
			uid := hold.held(s.node, r.pod, req)

			old := s.serving
			s.build = tt.to
			s.serving = s.start(t, "")
			eventually(t, "the new process has asked for the state", func() bool {
				b, err := os.ReadFile(filepath.Join(s.dir, "log"))
				must(t, err)
				return bytes.Contains(b, []byte("another process wants to take over"))
			})
			hold.release()
			over(t, old)
			r.judge(t, s.node, s.end(t, uid))
		})
	}
}

// TestAnotherVersionTakesOverInPreStop has each version take over from the other while a preStop
// hook runs. The restart goes on in the second process.
func TestAnotherVersionTakesOverInPreStop(t *testing.T) {
	for name, versions := range map[string][2]build{
		"forward": {binaryBefore, failpointBinary},
		"back":    {failpointBinary, binaryBefore},
	} {
		t.Run(name, func(t *testing.T) {
			s := startInstancesOf(t, versions[0], "")
			var r restartTest
			r.pods(t, s.node)
			r.seen = r.pod.watch("app")
			req := restartOf("app")
			req.Containers[0].PreStop = execHook("sh", "-c", "echo hook >> /proc/1/fd/1; sleep 4")
			req.Containers[0].GracePeriodSeconds = proto.Int64(20)
			uid := s.begin(t, r.pod, req)
			r.pod.logs(t, "app", 0, "hook")
			s.build = versions[1]
			s.next(t)
			op, err := s.ops.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid}, grpc.WaitForReady(true))
			must(t, err)
			if op.GetFinishTime() != nil {
				t.Errorf("the first process has ended the restart: %v", op)
			}
			r.judge(t, s.node, s.end(t, uid))
		})
	}
}

// TestImageUpdateOfVersionBefore has the version before prepare, or arm, an image update that the
// checkout's version ends with kubelet.
func TestImageUpdateOfVersionBefore(t *testing.T) {
	for _, armed := range []bool{false, true} {
		for _, killed := range []bool{false, true} {
			name := map[bool]string{false: "prepared", true: "armed"}[armed] +
				map[bool]string{false: ", taken over", true: ", killed"}[killed]
			t.Run(name, func(t *testing.T) {
				s := startInstancesOf(t, binaryBefore, "")
				p := s.runPod(t)
				app := p.runSpec(t, version1())
				uid := s.toVersion2(t, p, nil)
				if armed {
					s.arm(t, uid)
				}
				s.build = failpointBinary
				if killed {
					must(t, s.serving.Process.Kill())
					_ = s.serving.Wait()
					s.serving = s.start(t, "")
				} else {
					s.next(t)
				}
				seen := p.watch("app")
				if !armed {
					s.waitFor(t, uid,
						func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED })
					s.arm(t, uid)
				}
				s.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_ARMED })
				created := p.replace(t, app, version2())
				if bad := seen.stop(); len(bad) > 0 {
					t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
				}
				op := s.end(t, uid)
				c := op.GetContainers()[0]
				if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetSuccessorId() != created ||
					c.GetMethod() == "kubelet" {
					t.Errorf("kubelet was given %s by %v", created, op)
				}
				if running, all := p.running(t, s.direct, "app"); running != 1 || all != 2 {
					t.Errorf("%d running of %d", running, all)
				}
				p.logs(t, "app", 0, "asked")
				p.began(t, "app", 1)
				if strings.Count(p.log(t, "app", 0), "asked") != 1 ||
					strings.Count(p.log(t, "app", 1), "started") != 1 {
					t.Errorf("old: %s\nnew: %s", p.log(t, "app", 0), p.log(t, "app", 1))
				}
			})
		}
	}
}

// TestRecordsOfVersionBefore has the checkout's version read what the version before has written
// about operations that are over: their answers, an override, and the records of the containers.
func TestRecordsOfVersionBefore(t *testing.T) {
	s := startInstancesOf(t, binaryBefore, "")
	p := s.runPod(t)
	p.runSpec(t, version1())
	req := overrideWith(bed.busybox2)
	op := s.restart(t, p, req)
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	s.build = failpointBinary
	s.next(t)
	eventually(t, "the new process answers", func() bool {
		_, err := s.ops.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{}, grpc.WaitForReady(true))
		return err == nil
	})
	again, err := s.ops.Restart(t.Context(), req)
	must(t, err)
	if !proto.Equal(again, op) {
		t.Errorf("repeated command: %v, want %v", again, op)
	}
	s.has(t, p, 1, "2.0", bed.busybox2)
	// kubelet makes the container anew, from the spec that it knows.
	p.crash(t, s.node, op.GetContainers()[0].GetSuccessorId(), version1())
	s.has(t, p, 2, "2.0", bed.busybox2)
	back := s.restart(t, p, revertImage())
	if back.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", back)
	}
	s.has(t, p, 3, "1.0", "")
}
