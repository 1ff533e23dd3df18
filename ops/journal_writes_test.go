// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

// journalWrites returns how many transactions the journal's file has had. Each waits for the disk.
func journalWrites(t *testing.T, e *engine) (n int) {
	t.Helper()
	err := e.disk.Journal.View(func(tx *bolt.Tx) error { n = tx.ID(); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Each write of the journal waits for the disk, some of them while no container serves.
func TestJournalWritesOfARestart(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*opsv1.RestartRequest)
		want int
	}{
		// accepted, stage, staged, stop, started, reveal, done
		"plain": {func(*opsv1.RestartRequest) {}, 7},
		// StopBy must be on disk before the hook runs
		"preStop": {func(r *opsv1.RestartRequest) { r.Containers[0].PreStop = execHook("true") }, 8},
		// that postStart has been tried, and that it has ended well
		"postStart": {func(r *opsv1.RestartRequest) { r.Containers[0].PostStart = execHook("true") }, 9},
		"both hooks": {
			func(r *opsv1.RestartRequest) {
				r.Containers[0].PreStop, r.Containers[0].PostStart = execHook("true"), execHook("true")
			}, 10,
		},
		"two ordered containers": {
			func(r *opsv1.RestartRequest) {
				r.Ordered = true
				r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
			}, 13,
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, podOptions{})
			n.runTidied()
			n.restart("first") // makes the file
			n.finish("first")
			before := journalWrites(t, n.engine)
			n.restart("op", tc.edit)
			if got, want := verdict(n.finish("op")), "SUCCEEDED, app SUCCEEDED"; !strings.HasPrefix(got, want) {
				t.Fatalf("operation ended %s, want %s", got, want)
			}
			if got := journalWrites(t, n.engine) - before; got != tc.want {
				t.Errorf("%d writes, want %d", got, tc.want)
			}
		})
	}
}

// afterStopIsWritten calls f once, when the journal has the step stop and nothing has been stopped:
// right after the step has been written, a restart asks kubelet for the pod's startup probes.
func (n *node) afterStopIsWritten(f func()) {
	var once sync.Once
	n.engine.node.Pods = podsFunc(func(context.Context) (*podsapi.Pod, error) {
		once.Do(f)
		return nil, errors.New("kubelet does not answer")
	})
}

// recordOf returns the journal's part of the operation's first container.
func recordOf(t *testing.T, j *store.Journal, uid string) (c store.Container) {
	t.Helper()
	err := j.View(func(tx *bolt.Tx) error {
		r, err := store.DecodeRecord(tx.Bucket(bucketOperations).Get([]byte(uid)))
		if err == nil {
			c = r.Containers[0]
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ownCalls are the mutating calls of the engine since the last look.
func (n *node) ownCalls() string {
	var own []string
	for _, c := range fakenode.Mutating(n.rt.TakeCalls()) {
		if !strings.HasPrefix(c, "kubelet:") {
			own = append(own, c)
		}
	}
	return strings.Join(own, "; ")
}

// The process ends when the one write of the point of no return and of the step stop is on disk.
// The next one also takes up what the version before has left there, and what is there while a
// preStop hook runs: the point of no return alone.
func TestProcessEndsBeforeTheStop(t *testing.T) {
	orders := map[string]struct {
		edit   func(*opsv1.RestartRequest)
		before string // the step before stop
	}{
		"stop first":  {func(*opsv1.RestartRequest) {}, "staged"},
		"start first": {startFirst, "start"},
	}
	for order, o := range orders {
		for name, tc := range map[string]struct{ killed, old bool }{
			"killed": {killed: true}, "killed, old record": {killed: true, old: true}, "shut down": {},
		} {
			t.Run(order+", "+name, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, podOptions{processes: true})
				ended, state := make(chan struct{}), ""
				d := n.daemon
				n.afterStopIsWritten(func() {
					if c := recordOf(t, d.engine.disk.Journal, "op"); c.Step != store.StepStop || c.StopBy.IsZero() {
						t.Errorf("the journal has step %q, stop by %s", c.Step, c.StopBy)
					}
					if tc.killed {
						state = n.crash()
					} else {
						d.stop()
					}
					close(ended)
				})
				n.runTidied()
				n.restart("op", o.edit)
				awaitClosed(t, ended)
				if !tc.killed {
					d.ran.Wait()
					state = n.state
					n.must(d.engine.Close())
					if got := n.ownCalls(); strings.Contains(got, "StopContainer") {
						t.Errorf("called %s", got)
					}
				}
				if tc.old {
					foreignRecord(t, state, "op", func(r map[string]any) {
						r["containers"].([]any)[0].(map[string]any)["step"] = o.before
					})
				}
				n.rt.TakeCalls()
				n.boot(state)
				n.state = state
				if err := n.checkView(); err != nil {
					t.Error(err)
				}
				if err := n.engine.Lookup("op").Cancel("enough"); err == nil {
					t.Error("cancelled past the point of no return")
				}
				end := n.relist()
				n.run()
				op := n.finish("op")
				end()
				if got, want := verdict(op), "SUCCEEDED, app SUCCEEDED"; got != want {
					t.Errorf("operation ended %s (%s), want %s", got, op.GetMessage(), want)
				}
				if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
					t.Errorf("runtime has %s, want %s", got, want)
				}
				if got := n.ownCalls(); strings.Count(got, "StopContainer app/0") != 1 ||
					strings.Contains(got, "Create") {
					t.Errorf("the next process called %s", got)
				}
			})
		}
	}
}

// Kubelet takes the slot back when the step stop is on disk and nothing has been stopped: a
// successor that was never started is removed without being asked to stop.
func TestTakenBackBeforeTheStop(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*opsv1.RestartRequest)
		want string
	}{
		"stop first": {func(*opsv1.RestartRequest) {}, "CreateContainer app/1; RemoveContainer app/1"},
		"start first": {
			startFirst,
			"CreateContainer app/1; StartContainer app/1; StopContainer app/1 7s; RemoveContainer app/1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			var asked atomic.Bool
			var answered func()
			incumbent := n.rt.ID(t, "app/0")
			n.engine.node.Pods = podsFunc(func(ctx context.Context) (*podsapi.Pod, error) {
				if !asked.Swap(true) {
					answered = n.asKubelet(func(ctx context.Context, k runtimeapi.RuntimeServiceClient) error {
						_, err := k.StopContainer(ctx,
							&runtimeapi.StopContainerRequest{ContainerId: incumbent, Timeout: 7})
						return err
					})
					n.log.await(t, "takes the slot back")
				}
				return deleting(ctx)
			})
			n.runTidied()
			n.rt.TakeCalls()
			n.restart("op", tc.edit)
			op := n.finish("op")
			if got, want := verdict(op), "FAILED, app FAILED "+opsv1.ReasonTakenBackByKubelet; got != want {
				t.Errorf("operation ended %s, want %s", got, want)
			}
			if got := n.ownCalls(); got != tc.want {
				t.Errorf("engine called %s\nwant %s", got, tc.want)
			}
			answered()
		})
	}
}

// hook is a hook of a logger.
type hook func(line string)

func (hook) Levels() []logrus.Level { return logrus.AllLevels }

func (h hook) Fire(e *logrus.Entry) error {
	h(e.Message)
	return nil
}

// The process dies when the end of a container is on disk, and its slot is still held. If it is the
// last container, the next process finds the operation finished. What the version before has left
// there, which wrote the end of the operation after that, is finished by the next process.
func TestCrashAtTheEnd(t *testing.T) {
	ordered := func(r *opsv1.RestartRequest) {
		r.Ordered = true
		r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "web"})
	}
	for name, tc := range map[string]struct {
		edit  func(*opsv1.RestartRequest)
		at    int // how many containers have ended
		slot  string
		found string // what the next process finds
		old   bool
		want  string
		calls string // of the next process
	}{
		"one container": {
			func(*opsv1.RestartRequest) {}, 1, "app", "SUCCEEDED, app SUCCEEDED", false, "SUCCEEDED, app SUCCEEDED", "",
		},
		"one container, old record": {
			func(*opsv1.RestartRequest) {}, 1, "app", "unfinished", true, "SUCCEEDED, app SUCCEEDED", "",
		},
		"first of two": {
			ordered, 1, "app", "unfinished", false, "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
			"CreateContainer web/1; StopContainer web/0 30s; StartContainer web/1",
		},
		"last of two": {
			ordered, 2, "web", "SUCCEEDED, app SUCCEEDED, web SUCCEEDED", false,
			"SUCCEEDED, app SUCCEEDED, web SUCCEEDED", "",
		},
		"last of two, old record": {
			ordered, 2, "web", "unfinished", true, "SUCCEEDED, app SUCCEEDED, web SUCCEEDED", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, podOptions{})
			crashed, state := make(chan struct{}), ""
			ends, d := 0, n.daemon // the containers end one after the other
			d.engine.node.Log.(*logrus.Entry).Logger.AddHook(hook(func(line string) {
				if line != "container restart ended" {
					return
				}
				if ends++; ends != tc.at {
					return
				}
				if d.engine.Lookup("op").Finished() ||
					!d.view.Claimed(view.Slot{PodUID: podUID, Container: tc.slot}) {
					t.Error("the operation has ended, or its slot is free, before both can be")
				}
				state = n.crash()
				close(crashed)
			}))
			n.runTidied()
			n.restart("op", tc.edit)
			awaitClosed(t, crashed)
			if tc.old {
				foreignRecord(t, state, "op", unfinished(t))
			}
			n.rt.TakeCalls()
			before := n.sees()
			n.boot(state)
			n.state = state
			if got := endOf(t, n.engine.disk.Journal, "op"); got != tc.found {
				t.Errorf("the journal has %s, want %s", got, tc.found)
			}
			if n.engine.Lookup("op").Finished() != (tc.found != "unfinished") {
				t.Error("the next process does not go by the journal")
			}
			if n.view.Active() || n.sees() != before {
				t.Errorf("kubelet sees %s after the crash, %s before it", n.sees(), before)
			}
			end := n.relist()
			n.run()
			if got := verdict(n.finish("op")); got != tc.want {
				t.Errorf("operation ended %s, want %s", got, tc.want)
			}
			end()
			if got := n.ownCalls(); got != tc.calls {
				t.Errorf("the next process called %s, want %s", got, tc.calls)
			}
			n.restart("again")
			if got, want := verdict(n.finish("again")), "SUCCEEDED, app SUCCEEDED"; got != want {
				t.Errorf("another restart ended %s, want %s", got, want)
			}
		})
	}
}

// unfinished takes the end of the operation out of its record. Those of its containers stay.
func unfinished(t *testing.T) func(record map[string]any) {
	return func(r map[string]any) {
		raw, err := base64.StdEncoding.DecodeString(r["operation"].(string))
		op := &opsv1.Operation{}
		if err == nil {
			err = proto.Unmarshal(raw, op)
		}
		if err != nil {
			t.Fatal(err)
		}
		op.FinishTime, op.Phase = nil, opsv1.Phase_PHASE_REVEALING
		r["operation"] = base64.StdEncoding.EncodeToString(wire(t, op))
	}
}
