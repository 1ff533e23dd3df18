// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/imageupdate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/store"
	"github.com/cri-proxy/cri-proxy/ops/swap"
	"github.com/cri-proxy/cri-proxy/test/fakenode"
)

func seconds(n int64) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }

// What keeps an upgrade from being armed touches nothing that runs, and says why.
func TestUpgradeFailures(t *testing.T) {
	failed := func(reason string) string { return "FAILED, app FAILED " + reason }
	for _, tc := range []struct {
		name   string
		edit   func(*opsv1.PrepareUpgradeRequest)
		script func(n *upNode)
		do     func(n *upNode) // while it waits
		commit bool
		want   string
		says   string
		after  time.Duration // when it ends, if that is fixed
	}{
		{
			name: "pull fails", want: failed(opsv1.ReasonPullFailed), says: "no such tag",
			script: func(n *upNode) {
				n.images.ensure = func(context.Context, *opsv1.PullRequest) (*opsv1.PullOperation, error) {
					return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FAILED, Reason: "NotFound",
						Message: "no such tag"}, nil
				}
			},
		},
		{
			name: "pull is refused", want: failed(opsv1.ReasonPullFailed), says: "not a reference",
			script: func(n *upNode) {
				n.images.ensure = func(context.Context, *opsv1.PullRequest) (*opsv1.PullOperation, error) {
					return nil, errors.New("not a reference")
				}
			},
		},
		{
			name: "pull takes too long", edit: func(r *opsv1.PrepareUpgradeRequest) { r.PrepareTimeout = seconds(90) },
			want: failed(opsv1.ReasonPrepareTimeout), says: "within 1m30s, in phase pulling", after: 90 * time.Second,
			script: func(n *upNode) { n.images.ensure = endless },
		},
		{
			name: "pull takes too long by default", want: failed(opsv1.ReasonPrepareTimeout),
			after:  swap.DefaultPrepare,
			script: func(n *upNode) { n.images.ensure = endless },
		},
		{name: "the same image", edit: first(func(c *opsv1.ContainerUpgrade) { c.Image = "app:v1" }),
			want: failed(opsv1.ReasonImageUnchanged), says: "restart it instead"},
		{
			name: "the same image, pulled again",
			edit: first(func(c *opsv1.ContainerUpgrade) {
				c.Image, c.PullPolicy = "app:v1",
					opsv1.PullPolicy_PULL_POLICY_ALWAYS
			}),
			want: "CANCELLED, app CANCELLED " + opsv1.ReasonImageUnchanged, says: "runs what that names now",
		},
		{
			name: "the same tag, which has moved",
			edit: first(func(c *opsv1.ContainerUpgrade) {
				c.Image, c.PullPolicy = "app:v1",
					opsv1.PullPolicy_PULL_POLICY_ALWAYS
			}),
			want: "CANCELLED, app CANCELLED " + opsv1.ReasonImageMoved, says: "a restart starts it",
			script: func(n *upNode) {
				n.images.ensure = func(context.Context, *opsv1.PullRequest) (*opsv1.PullOperation, error) {
					n.images.images["app:v1"] = &runtimeapi.Image{Id: "sha256:moved"}
					return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, nil
				}
			},
		},
		{
			name: "the image is gone again", edit: first(func(c *opsv1.ContainerUpgrade) { c.Image = "app:v9" }),
			want: failed(opsv1.ReasonPullFailed), says: "was it removed meanwhile?",
		},
		{
			name: "would run as root", edit: first(func(c *opsv1.ContainerUpgrade) { c.RunAsNonRoot = true }),
			want: failed(opsv1.ReasonImageUnfit), says: "run as root",
		},
		{
			name: "cannot be created", want: failed(opsv1.ReasonCreateFailed), says: "no space left",
			script: func(n *upNode) { n.refuse("CreateContainer app/1", status.Error(codes.Unknown, "no space left")) },
		},
		{
			name: "another container by then",
			edit: first(func(c *opsv1.ContainerUpgrade) { c.ExpectedContainerId = "containerd://other" }),
			want: "refused", says: "ask again without an expected ID",
		},
		{
			name: "not committed", edit: func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(60) },
			want: failed(opsv1.ReasonHoldTimeout), says: "not committed within 1m0s", after: time.Minute,
		},
		{name: "not committed by default", want: failed(opsv1.ReasonHoldTimeout), after: swap.DefaultHold},
		{
			name: "not stopped", edit: func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(60) },
			commit: true,
			want:   failed(opsv1.ReasonHoldTimeout), says: "was the pod's spec patched?", after: time.Minute,
		},
		{
			name: "ends before the commit", want: failed(opsv1.ReasonContainerNotRunning), commit: true,
			says: "exit code 3",
			do:   func(n *upNode) { n.rt.Exit(n.t, "app/0", 3) },
		},
		{
			name: "aborted when prepared", want: "CANCELLED, app CANCELLED Cancelled", says: "enough", do: abort,
		},
		{
			name: "cannot start", edit: first(runBeside), commit: true, want: failed(opsv1.ReasonStartFailed),
			says:   "no such file",
			script: func(n *upNode) { n.rt.Set(func(f *fakenode.Runtime) { failStarts(f, 100) }) },
		},
		{
			name: "exits before it is ready",
			edit: first(func(c *opsv1.ContainerUpgrade) { runBeside(c); c.MinReadySeconds = 60 }), commit: true,
			want: failed(opsv1.ReasonNewContainerExited), says: "exit code 7",
			script: func(n *upNode) {
				n.after("StartContainer app/1", func() {
					go func() {
						time.Sleep(10 * time.Second)
						n.rt.Exit(n.t, "app/1", 7)
					}()
				})
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				if tc.script != nil {
					tc.script(n)
				}
				var edits []func(*opsv1.PrepareUpgradeRequest)
				if tc.edit != nil {
					edits = append(edits, tc.edit)
				}
				began := time.Now()
				_, err := n.api.PrepareUpgrade(t.Context(), upgradeRequest("op", edits...))
				if tc.want == "refused" {
					if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), tc.says) {
						t.Errorf("got %v", err)
					}
					return
				}
				n.must(err)
				if tc.do != nil || tc.commit {
					n.until("op", opsv1.Phase_PHASE_PREPARED)
				}
				if tc.do != nil {
					tc.do(n)
				}
				if tc.commit {
					n.commit("op")
				}
				op := n.until("op")
				state := untouched
				if tc.name == "ends before the commit" {
					state = "app/0 EXITED, web/0 RUNNING"
				}
				n.ends("op", tc.want, state)
				if said := op.GetMessage(); !strings.Contains(said, tc.says) {
					t.Errorf("says %q, want %q", said, tc.says)
				}
				if took := op.GetFinishTime().AsTime().
					Sub(began); tc.after > 0 && (took < tc.after || took > tc.after+5*time.Second) {
					t.Errorf("ended after %s, want %s", took, tc.after)
				}
				if calledStop(n.rt.TakeCalls()) {
					t.Error("the container has been stopped")
				}
				if _, err := n.api.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: "op"}); !tc.commit &&
					status.Code(err) != codes.FailedPrecondition {
					t.Errorf("commit of what has ended: %v", err)
				}
				n.rt.Set(func(f *fakenode.Runtime) { f.Before, f.After, f.OnStart = nil, nil, nil })
				n.must(n.sync(t.Context(), "app", "app:v2")) // the slot is free
			})
		})
	}
}

// An upgrade waits for the slot, with the image at hand, as long as the preparation may take.
func TestUpgradeWaitsForTheSlot(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		c, err := n.view.TryClaim(appSlot)
		n.must(err)
		began := time.Now()
		n.begin("op")
		op := n.until("op")
		c.Release()
		n.ends("op", "FAILED, app FAILED PrepareTimeout", untouched)
		if took := op.GetFinishTime().AsTime().Sub(began); took != swap.DefaultPrepare {
			t.Errorf("ended after %s", took)
		}
		if says := "waiting for the container, which another operation has"; !strings.Contains(op.GetMessage(), says) {
			t.Errorf("says %q, want %q", op.GetMessage(), says)
		}
		n.armed("next")
		n.begin("late", first(func(c *opsv1.ContainerUpgrade) { c.Image = "app:v3" }),
			func(r *opsv1.PrepareUpgradeRequest) { r.PrepareTimeout = seconds(10) })
		if op, says := n.until("late"),
			"not ready within 10s, waiting for the container, which operation next "+
				"has"; !strings.Contains(op.GetMessage(), says) {
			t.Errorf("says %q, want %q", op.GetMessage(), says)
		}
		n.must(n.sync(t.Context(), "app", "app:v2"))
		n.ends("next", succeeded, upgraded)
	})
}

// endless is a pull that does not end by itself.
func endless(ctx context.Context, _ *opsv1.PullRequest) (*opsv1.PullOperation, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func abort(n *upNode) {
	n.t.Helper()
	_, err := n.api.AbortUpgrade(n.t.Context(), &opsv1.AbortUpgradeRequest{Uid: "op", Reason: "enough"})
	n.must(err)
}

// refuse makes the engine's calls that begin with prefix fail.
func (n *upNode) refuse(prefix string, err error) {
	n.rt.Set(func(f *fakenode.Runtime) {
		f.Before = func(call string) error {
			if strings.HasPrefix(call, prefix) {
				return err
			}
			return nil
		}
	})
}

// after calls f after the engine's first call that begins with prefix.
func (n *upNode) after(prefix string, f func()) {
	done := false
	n.rt.Set(func(rt *fakenode.Runtime) {
		rt.After = func(call string) error {
			if strings.HasPrefix(call, prefix) && !done {
				done = true
				f()
			}
			return nil
		}
	})
}

// An upgrade is aborted at each state before kubelet has begun to stop the container, and not after
// that.
func TestUpgradeAborted(t *testing.T) {
	const cancelled = "CANCELLED, app CANCELLED Cancelled"
	for _, edit := range []func(*opsv1.PrepareUpgradeRequest){first(func(*opsv1.ContainerUpgrade) {}),
		first(runBeside)} {
		order := upgradeRequest("", edit).GetContainers()[0].GetOrder().String()
		t.Run(order+", pulling", func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.images.ensure = endless
				n.begin("op", edit)
				n.until("op", opsv1.Phase_PHASE_PULLING)
				abort(n)
				n.ends("op", cancelled, untouched)
			})
		})
		t.Run(order+", waiting for the slot", func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("before", edit)
				n.begin("op", edit, first(func(c *opsv1.ContainerUpgrade) { c.Image = "app:v3" }))
				synctest.Wait()
				abort(n)
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.ends("op", cancelled, upgraded)
				n.ends("before", succeeded, upgraded)
			})
		})
		t.Run(order+", or its turn comes", func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("before", edit)
				n.begin("op", edit, first(func(c *opsv1.ContainerUpgrade) { c.Image = "app:v3" }))
				synctest.Wait()
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.until("op", opsv1.Phase_PHASE_PREPARED)
				if got, want := strings.Join(n.images.pinned, " "), "sha256:app:v1 sha256:app:v2"; got != want {
					t.Errorf("pinned are %s, want %s", got, want)
				}
				n.commit("op")
				n.until("op", opsv1.Phase_PHASE_ARMED)
				n.must(n.sync(t.Context(), "app", "app:v3"))
				n.ends("op", succeeded, "app/0 EXITED, app/1 EXITED, app/2 RUNNING, web/0 RUNNING")
			})
		})
		t.Run(order+", armed", func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("op", edit)
				abort(n)
				n.ends("op", cancelled, untouched)
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.settled(upgraded)
			})
		})
		t.Run(order+", stopping", func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				n.armed("op", edit)
				n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "app/0"), 30))
				if _, err := n.api.AbortUpgrade(t.Context(), &opsv1.AbortUpgradeRequest{Uid: "op"}); status.Code(
					err) != codes.FailedPrecondition {
					t.Errorf("got %v", err)
				}
				n.must(n.sync(t.Context(), "app", "app:v2"))
				n.ends("op", succeeded, upgraded)
			})
		})
	}
}

// A successor that runs beside its incumbent and dies is not what kubelet gets.
func TestSuccessorDiesWhileArmed(t *testing.T) {
	t.Run("before kubelet comes", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", first(runBeside))
			n.rt.Exit(t, "app/1", 7)
			n.ends("op", "FAILED, app FAILED NewContainerExited", untouched)
		})
	})
	t.Run("at the moment that kubelet comes", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", first(runBeside))
			n.rt.Exit(t, "app/1", 7)
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", "FAILED, app FAILED NewContainerExited", upgraded)
			if st := n.rt.Get(t, "app/1").Status; st.GetAnnotations()[view.StagedAnnotation] != "" {
				t.Error("kubelet has got the one that died")
			}
		})
	})
	t.Run("and cannot be started", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			n.rt.Set(func(f *fakenode.Runtime) { failStarts(f, 2) })
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", "FAILED, app FAILED StartFailed", upgraded)
		})
	})
	t.Run("and is started at the second try", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			n.rt.Set(func(f *fakenode.Runtime) { failStarts(f, 1) })
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", succeeded, upgraded)
		})
	})
	t.Run("the old one cannot be stopped", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op")
			n.refuse("StopContainer app/0", status.Error(codes.Unknown, "shim is gone"))
			n.must(n.sync(t.Context(), "app", "app:v2")) // kubelet's own stop works
			n.ends("op", "FAILED, app FAILED StopFailed", upgraded)
		})
	})
}

// Several containers of a pod are upgraded together, or none is as long as none has been stopped.
func TestUpgradeOfTwoContainers(t *testing.T) {
	t.Run("both", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", webToo)
			n.must(n.sync(t.Context(), "web", "web:v2"))
			if op := n.until("op", opsv1.Phase_PHASE_ARMED); op.GetFinishTime() != nil {
				t.Errorf("operation: %v", op)
			}
			n.must(n.sync(t.Context(), "app", "app:v2"))
			n.ends("op", "SUCCEEDED, app SUCCEEDED, web SUCCEEDED",
				"app/0 EXITED, app/1 RUNNING, web/0 EXITED, web/1 RUNNING")
		})
	})
	t.Run("one cannot be pulled", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.images.ensure = func(ctx context.Context, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
				if r.GetImage() == "web:v2" {
					time.Sleep(time.Minute)
					return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FAILED}, nil
				}
				return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, nil
			}
			n.neverIn("op", opsv1.Phase_PHASE_PREPARED, webToo)
			n.ends("op", "FAILED, app CANCELLED Cancelled, web FAILED PullFailed", untouched)
		})
	})
	t.Run("one does not come up", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.prepared("op", webToo, func(r *opsv1.PrepareUpgradeRequest) {
				runBeside(r.Containers[1])
				r.Containers[1].MinReadySeconds = 60
			})
			n.after("StartContainer web/1", func() {
				go func() {
					time.Sleep(10 * time.Second)
					n.rt.Exit(n.t, "web/1", 7)
				}()
			})
			seen := n.phases("op")
			n.commit("op")
			n.ends("op", "FAILED, app CANCELLED Cancelled, web FAILED NewContainerExited", untouched)
			if got := seen(); strings.Contains(got, "armed") {
				t.Errorf("the caller was told to go on: %s", got)
			}
		})
	})
	t.Run("one is taken back, the other one too", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", webToo, first(runBeside))
			n.rt.Exit(t, "app/1", 7)
			n.ends("op", "FAILED, app FAILED NewContainerExited, web CANCELLED Cancelled", untouched)
		})
	})
	t.Run("one fails when the other one is stopped already", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", webToo, first(runBeside))
			n.must(n.kubeletStops(t.Context(), n.rt.ID(t, "web/0"), 30))
			n.rt.Exit(t, "app/1", 7)
			n.must(n.sync(t.Context(), "web", "web:v2"))
			n.ends("op", "FAILED, app FAILED NewContainerExited, web SUCCEEDED",
				"app/0 RUNNING, web/0 EXITED, web/1 RUNNING")
		})
	})
	t.Run("the process dies before the rest is taken back", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", webToo, first(runBeside))
			o := n.engine.Lookup("op")
			_, err := o.Container(0).Write(func(rec *store.Container, c *opsv1.ContainerOperation) {
				rec.Step, c.Phase = store.StepDone, opsv1.Phase_PHASE_FAILED
				c.Reason, c.Message = opsv1.ReasonNewContainerExited, "it ended"
			})
			n.must(err)
			_, err = n.rt.RemoveContainer(t.Context(),
				&runtimeapi.RemoveContainerRequest{ContainerId: n.rt.ID(t, "app/1")})
			n.must(err)
			n.reboot(n.crash())
			began := time.Now()
			n.ends("op", "FAILED, app FAILED NewContainerExited, web CANCELLED Cancelled", untouched)
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %s", took)
			}
		})
	})
}

// neverIn begins an upgrade and asserts that it ends without having been in that phase.
func (n *upNode) neverIn(uid string, phase opsv1.Phase, edit ...func(*opsv1.PrepareUpgradeRequest)) {
	n.t.Helper()
	n.begin(uid, edit...)
	seen := n.phases(uid)
	n.until(uid)
	if got := seen(); strings.Contains(got, operation.PhaseName(phase)) {
		n.t.Errorf("phases are %s", got)
	}
}

// phases collects the phases of an operation until it ends.
func (n *upNode) phases(uid string) (seen func() string) {
	o := n.engine.Lookup(uid)
	done := make(chan string, 1)
	go func() {
		var all []string
		for {
			op, changed := o.Watch()
			if p := operation.PhaseName(op.GetPhase()); len(all) == 0 || all[len(all)-1] != p {
				all = append(all, p)
			}
			if op.GetFinishTime() != nil {
				done <- strings.Join(all, " ")
				return
			}
			<-changed
		}
	}()
	return func() string { return <-done }
}

// olderKubelet has made app/0 with a hash of the whole spec, as kubelet before 1.31 does.
func olderKubelet(t *testing.T, n *upNode) {
	t.Helper()
	req := n.engine.node.Records.Request(n.rt.ID(t, "app/0"))
	req.Config.Annotations[criclone.AnnotationHash] = "1234"
	raw, err := proto.Marshal(req)
	n.must(err)
	n.engine.node.Records.Created(n.rt.ID(t, "app/0"), raw)
}

// A container that kubelet must make itself: the image is put ready, and the commit is all that is
// waited for.
func TestUpgradeLeftToKubelet(t *testing.T) {
	t.Run("committed", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			olderKubelet(t, n)
			n.prepared("op")
			if n.view.Active() || n.view.Claimed(appSlot) {
				t.Error("the slot is held")
			}
			n.commit("op")
			op := n.ends("op", succeeded, untouched)
			if c := op.GetContainers()[0]; c.GetMethod() != opsv1.MethodKubelet || len(c.GetWarnings()) != 1 {
				t.Errorf("operation: %v", op)
			}
		})
	})
	t.Run("not committed", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			olderKubelet(t, n)
			n.prepared("op")
			n.ends("op", "FAILED, app FAILED HoldTimeout", untouched)
		})
	})
	t.Run("the next process goes on waiting", func(t *testing.T) {
		inUpNode(t, func(t *testing.T, n *upNode) {
			olderKubelet(t, n)
			n.prepared("op", func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(7200) })
			time.Sleep(time.Hour) // longer than the preparation may take
			n.images.ensure = endless
			n.reboot(n.crash())
			synctest.Wait()
			if op := n.until("op", opsv1.Phase_PHASE_PREPARED); op.GetFinishTime() != nil {
				t.Fatalf("operation: %v", op)
			}
			n.commit("op")
			n.ends("op", succeeded, untouched)
		})
	})
}

// What an owner has had prepared and not committed does not stand in the way of what it wants now.
// What somebody else wants, or what is committed, is waited for.
func TestUpgradeSuperseded(t *testing.T) {
	by := func(owner, image string) func(*opsv1.PrepareUpgradeRequest) {
		return func(r *opsv1.PrepareUpgradeRequest) {
			r.Owner, r.Containers[0].Image, r.HoldTimeout, r.PrepareTimeout = owner, image, seconds(3600), seconds(7200)
		}
	}
	for _, tc := range []struct {
		name  string
		first func(*upNode)
		over  bool // the first one ends by the second
	}{
		{"prepared", func(n *upNode) { n.prepared("one", by("rollout", "app:v2")) }, true},
		{"being prepared", func(n *upNode) { n.begin("one", by("rollout", "app:v2")) }, true},
		{"found by the next process",
			func(n *upNode) { n.prepared("one", by("rollout", "app:v2")); n.reboot(n.crash()) }, true},
		{"committed", func(n *upNode) { n.armed("one", by("rollout", "app:v2")) }, false},
		{"of another owner", func(n *upNode) { n.prepared("one", by("other", "app:v2")) }, false},
		{"of nobody", func(n *upNode) { n.prepared("one", by("", "app:v2")) }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inUpNode(t, func(t *testing.T, n *upNode) {
				tc.first(n)
				began := time.Now()
				n.begin("two", by("rollout", "app:v3"))
				n.until("one", opsv1.Phase_PHASE_CANCELLED, opsv1.Phase_PHASE_FAILED)
				took := time.Since(began)
				if got := verdict(n.until("one")); tc.over != (took < time.Minute) ||
					tc.over != strings.HasPrefix(got, "CANCELLED") {
					t.Errorf("the first one ended %s after %s", got, took)
				}
				n.until("two", opsv1.Phase_PHASE_PREPARED)
				n.ends("two", "FAILED, app FAILED HoldTimeout", untouched)
			})
		})
	}
}

// An operation has its container made between the two looks that the check of the next command
// takes, at the slot and at the runtime.
func TestOperationBegunDuringTheCheck(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		wanted := func(image string) func(*opsv1.PrepareUpgradeRequest) {
			return func(r *opsv1.PrepareUpgradeRequest) { r.Owner, r.Containers[0].Image = "rollout", image }
		}
		var begun atomic.Bool
		n.rt.Set(func(rt *fakenode.Runtime) {
			rt.Before = func(call string) error {
				if strings.HasPrefix(call, "ListContainers") && begun.CompareAndSwap(false, true) {
					n.prepared("one", wanted("app:v2"))
				}
				return nil
			}
		})
		n.begin("two", wanted("app:v3"))
		if got := verdict(n.until("one")); !strings.HasPrefix(got, "CANCELLED") {
			t.Errorf("the first one: %s", got)
		}
		n.until("two", opsv1.Phase_PHASE_PREPARED)
	})
}

// The time for which an upgrade waits is one, however many processes wait.
func TestUpgradeHoldOutlivesProcesses(t *testing.T) {
	for name, wait := range map[string]func(*testing.T, *upNode, func(*opsv1.PrepareUpgradeRequest)){
		"for the commit": func(_ *testing.T, n *upNode,
			hold func(*opsv1.PrepareUpgradeRequest)) {
			n.prepared("op", hold)
		},
		"for kubelet": func(_ *testing.T, n *upNode, hold func(*opsv1.PrepareUpgradeRequest)) {
			n.prepared("op", hold)
			time.Sleep(4 * time.Minute) // of another wait
			n.reboot(n.crash())
			n.commit("op")
			n.until("op", opsv1.Phase_PHASE_ARMED)
		},
		"for the commit of what kubelet makes": func(t *testing.T, n *upNode, hold func(*opsv1.PrepareUpgradeRequest)) {
			olderKubelet(t, n)
			n.prepared("op", hold)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tc := range []struct {
				name   string
				lives  []time.Duration
				within time.Duration
			}{
				{name: "some is left", lives: []time.Duration{2 * time.Minute, time.Minute}, within: 2 * time.Minute},
				{name: "just over while nobody was there", lives: []time.Duration{299 * time.Second},
					within: imageupdate.HoldLeast},
			} {
				t.Run(tc.name, func(t *testing.T) {
					inUpNode(t, func(t *testing.T, n *upNode) {
						wait(t, n, func(r *opsv1.PrepareUpgradeRequest) { r.HoldTimeout = seconds(300) })
						for _, d := range tc.lives {
							time.Sleep(d)
							n.reboot(n.crash())
						}
						began := time.Now()
						n.ends("op", "FAILED, app FAILED HoldTimeout", untouched)
						if took := time.Since(began); took < tc.within || took > tc.within+5*time.Second {
							t.Errorf("taken back after %s, want %s", took, tc.within)
						}
					})
				})
			}
		})
	}
}

// Credentials are in memory only: what the node writes down, logs and tells has none of them.
func TestUpgradeCredentialsAreNotKept(t *testing.T) {
	const secret = "opensesame"
	inUpNode(t, func(t *testing.T, n *upNode) {
		given := func(r *opsv1.PrepareUpgradeRequest) {
			r.Credentials = []*opsv1.RegistryCredential{{Match: "registry.example", Username: "ali", Password: secret}}
		}
		gate := make(chan struct{})
		n.images.ensure = func(ctx context.Context, r *opsv1.PullRequest) (*opsv1.PullOperation, error) {
			if len(r.GetCredentials()) == 0 {
				return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_FAILED, Reason: "Unauthorized"}, nil
			}
			select {
			case <-gate:
				return &opsv1.PullOperation{Phase: opsv1.PullPhase_PULL_SUCCEEDED}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		clean := func() {
			t.Helper()
			for _, name := range []string{"journal.db", "records.db"} {
				b, err := os.ReadFile(filepath.Join(n.state, name))
				n.must(err)
				if bytes.Contains(b, []byte(secret)) {
					t.Errorf("%s has the password", name)
				}
			}
			n.log.mu.Lock()
			defer n.log.mu.Unlock()
			if lines := strings.Join(n.log.lines, "\n"); strings.Contains(lines, secret) {
				t.Errorf("logged: %s", lines)
			}
			if op := n.engine.Lookup("op").Snapshot(); strings.Contains(op.String(), secret) {
				t.Errorf("operation: %v", op)
			}
		}
		n.begin("op", given)
		n.until("op", opsv1.Phase_PHASE_PULLING)
		synctest.Wait()
		clean()
		n.reboot(n.crash())
		synctest.Wait()
		clean()
		op := n.engine.Lookup("op").Snapshot()
		if got := op.GetContainers()[0].GetPull().GetReason(); got != opsv1.ReasonCredentialsNeeded {
			t.Errorf("operation: %v", op)
		}
		// Kubelet is not kept from anything meanwhile.
		if n.view.Claimed(appSlot) {
			t.Error("the slot is held")
		}
		n.begin("op", given) // the caller repeats it
		close(gate)
		n.until("op", opsv1.Phase_PHASE_PREPARED)
		n.commit("op")
		n.until("op", opsv1.Phase_PHASE_ARMED)
		n.must(n.sync(t.Context(), "app", "app:v2"))
		n.ends("op", succeeded, upgraded)
		clean()
		if c, _, _ := n.engine.Lookup("op").Credentials(); len(c) > 0 {
			t.Error("the credentials are still in memory")
		}
	})
}

// A process that died while it staged leaves the slot to kubelet until the image is there again,
// which may take long.
func TestSlotIsFreeWhileTheImageIsPulledAgain(t *testing.T) {
	inUpNode(t, func(t *testing.T, n *upNode) {
		crashed := make(chan string, 1)
		n.rt.Set(func(f *fakenode.Runtime) {
			f.After = func(call string) error {
				if call == "CreateContainer app/1" {
					crashed <- n.crash()
				}
				return nil
			}
		})
		n.begin("op")
		state := <-crashed
		n.images.ensure = endless
		n.reboot(state)
		n.until("op", opsv1.Phase_PHASE_PULLING)
		synctest.Wait()
		n.rt.Exit(t, "app/0", 3)
		began := time.Now()
		n.must(n.sync(t.Context(), "app", "app:v1"))
		if took := time.Since(began); took > time.Second {
			t.Errorf("kubelet has waited %s", took)
		}
		abort(n)
		n.ends("op", "CANCELLED, app CANCELLED Cancelled", upgraded)
	})
}

// A journal that cannot be written, on a full disk for example, does not keep kubelet from
// replacing the container.
func TestUpgradeWithoutAJournal(t *testing.T) {
	for _, edit := range []func(*opsv1.PrepareUpgradeRequest){first(func(*opsv1.ContainerUpgrade) {}),
		first(runBeside)} {
		inUpNode(t, func(t *testing.T, n *upNode) {
			n.armed("op", edit, webToo)
			n.must(n.engine.disk.Journal.Close())
			began := time.Now()
			n.must(n.sync(t.Context(), "app", "app:v2"))
			if took := time.Since(began); took > 35*time.Second {
				t.Errorf("kubelet has waited %s", took)
			}
			if got := n.rt.Get(t, "app/1").Config.GetImage().GetUserSpecifiedImage(); got != "app:v2" {
				t.Errorf("runs %s", got)
			}
			n.engine.disk.Journal.Reopen()
			n.until("op")
			synctest.Wait()
			if got, want := n.rt.State(), "app/0 EXITED, app/1 RUNNING, web/0 RUNNING"; got != want {
				t.Errorf("runtime has %s, want %s", got, want)
			}
			op := n.engine.Lookup("op").Snapshot()
			if op.GetContainers()[0].GetReason() != opsv1.ReasonJournalError {
				t.Errorf("operation: %v", op)
			}
		})
	}
}
