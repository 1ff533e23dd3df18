// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// passing begins a list that goes through undecoded; the returned functions wait until the
// runtime has it, and let the runtime answer.
func passing(b *bed) (seen <-chan struct{}, answer func(), answered *sync.WaitGroup) {
	arrived, gate := make(chan struct{}), make(chan struct{})
	b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
		close(arrived)
		<-gate
		return &runtimeapi.ListContainersResponse{Containers: containers()}, nil
	})
	answered = &sync.WaitGroup{}
	answered.Go(func() {
		if _, err := b.raw(b.t.Context(), methodList, nil); err != nil {
			b.t.Error(err)
		}
	})
	return arrived, func() { close(gate) }, answered
}

func TestHideWaitsForCallsThatPassedUndecoded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		seen, answer, answered := passing(b)
		<-seen
		// Every operation waits, not only the one that made the view active.
		var hidden sync.WaitGroup
		done := make([]bool, 3)
		for i := range done {
			c, err := b.view.TryClaim(view.Slot{PodUID: "uid-1", Container: fmt.Sprint(i)})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Release()
			hidden.Go(func() {
				if err := c.Hide(t.Context(), fmt.Sprint(i)); err != nil {
					t.Error(err)
				}
				done[i] = true
			})
			synctest.Wait()
		}
		for i, d := range done {
			if d {
				t.Errorf("operation %d hides already, though a list is on its way undecoded", i)
			}
		}
		// Calls that begin now are decoded and need not be waited for.
		b.on(methodStatus, always(&runtimeapi.ContainerStatusResponse{}, nil))
		if _, err := b.raw(t.Context(), methodStatus, nil); err != nil {
			t.Error(err)
		}
		answer()
		answered.Wait()
		hidden.Wait()
	})
}

func TestHideGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		seen, answer, answered := passing(b)
		<-seen
		c := b.claimed()
		defer c.Release()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Hide(ctx, token); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if b.view.Active() {
			t.Error("hides although it gave up")
		}
		// The same claim may try again, and others are not disturbed.
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Hide(ctx, token); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		answer()
		answered.Wait()
		if err := c.Hide(t.Context(), token); err != nil {
			t.Error(err)
		}
	})
}

// Only answers that tell of containers are waited for: a hook of 30 s in any pod of the node is
// none of them.
func TestHideWaitsOnlyForWhatTellsOfContainers(t *testing.T) {
	tells := map[string]bool{}
	for _, name := range []string{
		"ListContainers", "ContainerStatus", "PodSandboxStatus", "ContainerStats", "ListContainerStats",
		"PodSandboxStats",
		"ListPodSandboxStats", "ListPodSandboxMetrics",
	} {
		tells["/runtime.v1.RuntimeService/"+name] = true
	}
	for _, method := range unaryMethods() {
		t.Run(method[strings.LastIndexByte(method, '/')+1:], func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				gate := make(chan struct{})
				b.on(method, func(context.Context, []byte) (proto.Message, error) {
					<-gate
					return &runtimeapi.VersionResponse{}, nil // nothing, in every method's encoding
				})
				answered := later(func() error {
					_, err := b.raw(t.Context(), method, nil)
					return err
				})
				synctest.Wait()
				c := b.claimed()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				err := c.Hide(ctx, token)
				if waited := err != nil; waited != tells[method] {
					t.Errorf("a call that is under way is waited for: %t", waited)
				}
				if err != nil && !strings.Contains(err.Error(), method[strings.LastIndexByte(method, '/')+1:]) {
					t.Errorf("%q does not name the call", err)
				}
				c.Release()
				close(gate)
				if err := <-answered; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestPassEndsOnceActive(t *testing.T) {
	b := newBed(t)
	if b.director.Unary(methodList) != nil {
		t.Fatal("takes a list with nothing to say")
	}
	c := b.swapping() // between Unary and Pass
	defer c.Release()
	if _, ok := b.director.Pass(methodList); ok {
		t.Error("a list passes undecoded though there is something to hide")
	}
	if b.director.Unary(methodList) == nil {
		t.Error("does not take the list")
	}
}

func TestTryRevealYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		b.serveList()
		b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
		c := b.swapping()
		var kubelet sync.WaitGroup
		kubelet.Go(func() {
			if _, err := call[runtimeapi.StopContainerResponse](
				t.Context(), b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: incumbent},
			); err != nil {
				t.Error(err)
			}
		})
		<-c.Yielded()
		if c.TryReveal() {
			t.Error("revealed though kubelet takes the slot back")
		}
		resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
			&runtimeapi.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got := show(resp.GetContainers()); got != "old RUNNING, web RUNNING, web-before EXITED" {
			t.Errorf("list shows %q", got)
		}
		c.Release()
		kubelet.Wait()
	})
}

// swappedRuntime is a runtime whose slot app is swapped over and over.
type swappedRuntime struct {
	mu   sync.Mutex
	list []*runtimeapi.Container // guarded by mu
}

func (r *swappedRuntime) create(id, token string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, &runtimeapi.Container{
		Id: id, PodSandboxId: sandbox, Labels: labels("app"), Annotations: map[string]string{
			view.StagedAnnotation: token,
		},
	})
}

// stage makes a successor, hidden, and masks the incumbent.
func (r *swappedRuntime) stage(t *testing.T, c *view.Claim, incumbent, id string) {
	c.Bind(sandbox, incumbent)
	if err := c.Hide(t.Context(), "token"+id); err != nil {
		t.Error(err)
	}
	r.create(id, "token"+id)
	c.Staged(id)
	c.Mask()
}

func (r *swappedRuntime) set(id string, s runtimeapi.ContainerState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, c := range r.list {
		if c.GetId() == id {
			r.list[i] = proto.Clone(c).(*runtimeapi.Container)
			r.list[i].State = s
		}
	}
}

func (r *swappedRuntime) serve(b *bed) {
	b.on(methodList, func(_ context.Context, raw []byte) (proto.Message, error) {
		req := &runtimeapi.ListContainersRequest{}
		if err := proto.Unmarshal(raw, req); err != nil {
			return nil, err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		return &runtimeapi.ListContainersResponse{Containers: list(slices.Clone(r.list), req.GetFilter())}, nil
	})
	b.on(methodStatus, func(_ context.Context, raw []byte) (proto.Message, error) {
		req := &runtimeapi.ContainerStatusRequest{}
		if err := proto.Unmarshal(raw, req); err != nil {
			return nil, err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, c := range r.list {
			if c.GetId() == req.GetContainerId() {
				return &runtimeapi.ContainerStatusResponse{
					Status: &runtimeapi.ContainerStatus{Id: c.GetId(), State: c.GetState(),
						Annotations: c.GetAnnotations()},
				}, nil
			}
		}
		return nil, status.Error(codes.NotFound, "no such container")
	})
}

// All methods from many goroutines, for the race detector. One of them reads as kubelet's PLEG
// does, a list and then the status of what it lists: it always finds one that runs.
func TestViewUnderLoad(t *testing.T) {
	b := newBed(t)
	rt := &swappedRuntime{}
	rt.create("0", "")
	rt.set("0", runtimeapi.ContainerState_CONTAINER_RUNNING)
	rt.serve(b)
	b.on(methodStop, always(&runtimeapi.StopContainerResponse{}, nil))
	ctx, cancel := context.WithCancel(t.Context())
	var kubelet, ops sync.WaitGroup
	kubelet.Go(func() {
		for ctx.Err() == nil {
			b.listSandboxes()
			resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			listed, alive := 0, 0
			b.inspect(sandbox)
			for _, c := range resp.GetContainers() {
				if c.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
					continue
				}
				listed++
				st, err := call[runtimeapi.ContainerStatusResponse](
					t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()},
				)
				if err == nil && st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
					alive++
				}
			}
			if listed != 1 || alive != 1 {
				t.Errorf("%d listed as running, %d alive: %v", listed, alive, resp.GetContainers())
				return
			}
		}
	})
	kubelet.Go(func() {
		for ctx.Err() == nil {
			resp, err := call[runtimeapi.ListContainersResponse](
				t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{Filter: inState(runtimeapi.ContainerState_CONTAINER_RUNNING)},
			)
			if err != nil {
				t.Error(err)
				return
			}
			if len(resp.GetContainers()) != 1 {
				t.Errorf("running: %v", resp.GetContainers())
				return
			}
		}
	})
	// Its other parts list too, in the middle of that, and the log manager asks for the status of
	// what runs.
	kubelet.Go(func() {
		for ctx.Err() == nil {
			resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			for _, c := range resp.GetContainers() {
				if _, err := call[runtimeapi.ContainerStatusResponse](
					t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()},
				); err != nil {
					t.Error(err)
				}
			}
		}
	})
	kubelet.Go(func() {
		for ctx.Err() == nil {
			_, filter, err := b.director.Stream(methodEvents)(ctx, methodEvents, nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := filter.Message(marshal(t, event(incumbent, stopped, exited(incumbent)))); err != nil {
				t.Error(err)
			}
			filter.Close()
		}
	})
	kubelet.Go(func() {
		for ctx.Err() == nil {
			if _, err := call[runtimeapi.StopContainerResponse](
				ctx, b, methodStop, &runtimeapi.StopContainerRequest{ContainerId: web},
			); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	current, next := "0", 1 // guarded by the claim
	for range 2 {
		ops.Go(func() {
			for i := range 150 {
				c, err := b.view.Claim(t.Context(), slot)
				if err != nil {
					t.Error(err)
					return
				}
				id := strconv.Itoa(next)
				next++
				rt.stage(t, c, current, id)
				_ = c.Stopping()
				rt.set(current, runtimeapi.ContainerState_CONTAINER_EXITED)
				rt.set(id, runtimeapi.ContainerState_CONTAINER_RUNNING)
				current = id
				if i%2 == 0 {
					c.TryReveal()
				}
				c.Release()
			}
		})
	}
	ops.Wait()
	cancel()
	kubelet.Wait()
	b.readAll()
	if b.view.Active() {
		t.Error("the view still has something to say")
	}
}

// PLEG looks at a pod only when its list has changed, and goes by what it has seen then. Once
// nothing is swapped any more, that must be the truth, whenever in a round the last reveal came.
func TestRoundsEndWithTheTruth(t *testing.T) {
	for range 100 {
		b := newBed(t)
		rt := &swappedRuntime{}
		rt.create("0", "")
		rt.set("0", runtimeapi.ContainerState_CONTAINER_RUNNING)
		rt.serve(b)
		listed, seen := map[string]runtimeapi.ContainerState{}, map[string]runtimeapi.ContainerState{}
		round := func() {
			b.listSandboxes()
			time.Sleep(time.Microsecond) // others have a turn
			resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			now := map[string]runtimeapi.ContainerState{}
			for _, c := range resp.GetContainers() {
				now[c.GetId()] = c.GetState()
			}
			if maps.Equal(now, listed) {
				return
			}
			listed = now
			b.inspect(sandbox)
			for _, c := range resp.GetContainers() {
				st, err := call[runtimeapi.ContainerStatusResponse](
					t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()},
				)
				if err != nil {
					t.Error(err)
					return
				}
				seen[c.GetId()] = st.GetStatus().GetState()
			}
		}
		done := make(chan struct{})
		var ops sync.WaitGroup
		ops.Go(func() {
			defer close(done)
			for i := range 3 {
				c, err := b.view.Claim(t.Context(), slot)
				if err != nil {
					t.Error(err)
					return
				}
				current, id := strconv.Itoa(i), strconv.Itoa(i+1)
				rt.stage(t, c, current, id)
				rt.set(current, runtimeapi.ContainerState_CONTAINER_EXITED)
				rt.set(id, runtimeapi.ContainerState_CONTAINER_RUNNING)
				c.Release()
				time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
			}
		})
		for swapping := true; swapping; {
			select {
			case <-done:
				swapping = false
			default:
			}
			round()
		}
		ops.Wait()
		round()
		want := map[string]runtimeapi.ContainerState{}
		for _, c := range rt.list {
			want[c.GetId()] = c.GetState()
		}
		if !maps.Equal(seen, want) {
			t.Fatalf("kubelet goes by %v, there is %v", seen, want)
		}
	}
}

// Kubelet reads a list and then the status of each container in it. A reveal between the two must
// not make it see the incumbent's end without the successor, which is not in its list.
func TestRevealBetweenListAndStatus(t *testing.T) {
	look := func(b *bed, req *runtimeapi.ListContainersRequest) {
		t.Helper()
		if _, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList, req); err != nil {
			t.Fatal(err)
		}
	}
	stream := func(b *bed, req *runtimeapi.StreamContainersRequest) {
		t.Helper()
		_, filter := b.stream(runtimeapi.RuntimeService_StreamContainers_FullMethodName, req)
		for _, c := range containers() {
			msg := &runtimeapi.StreamContainersResponse{Containers: []*runtimeapi.Container{c}}
			if _, err := filter.Message(marshal(t, msg)); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := map[string]string{"io.kubernetes.pod.uid": "another"}
	all := &runtimeapi.ListContainersRequest{}
	ask := func(b *bed, id string) {
		t.Helper()
		if _, err := call[runtimeapi.ContainerStatusResponse](
			t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: id},
		); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		read func(*bed) // after the reveal
		told bool
	}{
		{"nothing", func(*bed) {}, false},
		{"a list of somebody else's", func(b *bed) { look(b, all) }, false},
		{"the successor, of which nobody was told", func(b *bed) { ask(b, successor) }, false},
		{"the successor, before the list", func(b *bed) { ask(b, successor); look(b, all) }, false},
		{"another one", func(b *bed) { look(b, all); ask(b, web) }, false},
		{"what runs, as the log manager does", func(b *bed) { look(b, all); ask(b, successor) }, false},
		{"the log manager beside an older look at the pod", func(
			b *bed,
		) {
			look(b, all)
			b.inspect(sandbox)
			ask(b, successor)
		}, false},
		{"the whole pod, but for the list", func(
			b *bed,
		) {
			b.listSandboxes()
			b.inspect(sandbox)
			look(b, all)
			ask(b, successor)
		}, false},
		{"the whole of another pod", func(
			b *bed,
		) {
			b.listSandboxes()
			look(b, all)
			b.inspect("another")
			ask(b, successor)
		}, false},
		{"the whole pod", func(b *bed) { b.listSandboxes(); look(b, all); b.inspect(sandbox); ask(b, successor) },
			true},
		{"running ones", func(b *bed) {
			b.listSandboxes()
			look(b, &runtimeapi.ListContainersRequest{Filter: inState(runtimeapi.ContainerState_CONTAINER_RUNNING)})
			b.inspect(sandbox)
			ask(b, successor)
		}, false},
		{"another pod's", func(b *bed) {
			b.listSandboxes()
			look(b, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{LabelSelector: other}})
			b.inspect(sandbox)
			ask(b, successor)
		}, false},
		{"streams", func(b *bed) {
			b.director.Stream(runtimeapi.RuntimeService_StreamPodSandboxes_FullMethodName)
			stream(b, &runtimeapi.StreamContainersRequest{})
			b.inspect(sandbox)
			ask(b, successor)
		}, true},
		{"streams of running ones", func(b *bed) {
			b.director.Stream(runtimeapi.RuntimeService_StreamPodSandboxes_FullMethodName)
			stream(b, &runtimeapi.StreamContainersRequest{Filter: inState(runtimeapi.ContainerState_CONTAINER_RUNNING)})
			b.inspect(sandbox)
			ask(b, successor)
		}, false},
		{"the incumbent's removal", func(b *bed) { b.view.Forget(incumbent) }, true},
		{"the successor's removal, beside kubelet", func(b *bed) {
			b.on(methodStatus, func(_ context.Context, raw []byte) (proto.Message, error) {
				if bytes.Contains(raw, []byte(successor)) {
					return nil, status.Error(codes.NotFound, "no such container")
				}
				return &runtimeapi.ContainerStatusResponse{Status: exited(incumbent)}, nil
			})
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.serveList()
			b.serveStatus()
			c := b.swapping()
			look(b, &runtimeapi.ListContainersRequest{})
			c.Reveal()
			c.Release()
			tc.read(b)
			resp, err := call[runtimeapi.ContainerStatusResponse](
				t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: incumbent},
			)
			if err != nil {
				t.Fatal(err)
			}
			want := running(incumbent)
			if tc.told {
				want = exited(incumbent)
			}
			if !proto.Equal(resp.GetStatus(), want) {
				t.Errorf("got  %v\nwant %v", resp.GetStatus(), want)
			}
			if b.view.Active() == tc.told {
				t.Errorf("the view is active: %v", b.view.Active())
			}
		})
	}
}

// What has been revealed and never listed must not keep the view busy, nor the incumbent shown
// running, when it goes away.
func TestUnacknowledgedIsForgotten(t *testing.T) {
	for name, do := range map[string]func(b *bed) error{
		"incumbent removed": func(b *bed) error {
			_, err := call[runtimeapi.RemoveContainerResponse](
				b.t.Context(), b, runtimeapi.RuntimeService_RemoveContainer_FullMethodName,
				&runtimeapi.RemoveContainerRequest{ContainerId: incumbent},
			)
			return err
		},
		"successor removed": func(b *bed) error {
			_, err := call[runtimeapi.RemoveContainerResponse](
				b.t.Context(), b, runtimeapi.RuntimeService_RemoveContainer_FullMethodName,
				&runtimeapi.RemoveContainerRequest{ContainerId: successor},
			)
			return err
		},
		"sandbox removed": func(b *bed) error {
			_, err := call[runtimeapi.RemovePodSandboxResponse](
				b.t.Context(), b, runtimeapi.RuntimeService_RemovePodSandbox_FullMethodName,
				&runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox},
			)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.on(runtimeapi.RuntimeService_RemoveContainer_FullMethodName,
				always(&runtimeapi.RemoveContainerResponse{}, nil))
			b.on(runtimeapi.RuntimeService_RemovePodSandbox_FullMethodName,
				always(&runtimeapi.RemovePodSandboxResponse{}, nil))
			c := b.swapping()
			c.Reveal()
			c.Release()
			if !b.view.Active() {
				t.Fatal("nothing is to be told")
			}
			if err := do(b); err != nil {
				t.Fatal(err)
			}
			if b.view.Active() {
				t.Error("the view still has something to say")
			}
		})
	}
}
