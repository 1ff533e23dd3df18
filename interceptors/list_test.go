// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

const (
	methodList       = runtimeapi.RuntimeService_ListContainers_FullMethodName
	methodStreamList = runtimeapi.RuntimeService_StreamContainers_FullMethodName
)

// list is the runtime's ListContainers with containerd's filters
// (internal/cri/server/container_list.go).
func list(all []*runtimeapi.Container, f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	var out []*runtimeapi.Container
	for _, c := range all {
		match := strings.HasPrefix(c.GetId(), f.GetId()) && strings.HasPrefix(c.GetPodSandboxId(), f.GetPodSandboxId())
		match = match && (f.GetState() == nil || f.GetState().GetState() == c.GetState())
		for k, v := range f.GetLabelSelector() {
			match = match && c.GetLabels()[k] == v
		}
		if match {
			out = append(out, proto.Clone(c).(*runtimeapi.Container))
		}
	}
	return out
}

func (b *bed) serveList() {
	b.on(methodList, func(_ context.Context, raw []byte) (proto.Message, error) {
		req := &runtimeapi.ListContainersRequest{}
		if err := proto.Unmarshal(raw, req); err != nil {
			return nil, err
		}
		return &runtimeapi.ListContainersResponse{Containers: list(containers(), req.GetFilter())}, nil
	})
}

// serveStatus answers for the containers of containers().
func (b *bed) serveStatus() {
	b.on(methodStatus, func(_ context.Context, raw []byte) (proto.Message, error) {
		req := &runtimeapi.ContainerStatusRequest{}
		if err := proto.Unmarshal(raw, req); err != nil {
			return nil, err
		}
		for _, c := range containers() {
			if c.GetId() != req.GetContainerId() {
				continue
			}
			s := exited(c.GetId())
			if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				s = running(c.GetId())
			}
			s.Annotations = c.GetAnnotations()
			return &runtimeapi.ContainerStatusResponse{Status: s}, nil
		}
		return nil, status.Error(codes.NotFound, "no such container")
	})
}

// readAll reads as kubelet does: a list, and then the status of what it lists.
func (b *bed) readAll() {
	b.t.Helper()
	b.listSandboxes()
	resp, err := call[runtimeapi.ListContainersResponse](b.t.Context(), b, methodList,
		&runtimeapi.ListContainersRequest{})
	if err != nil {
		b.t.Fatal(err)
	}
	b.inspect(sandbox)
	for _, c := range resp.GetContainers() {
		if _, err := call[runtimeapi.ContainerStatusResponse](
			b.t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: c.GetId()},
		); err != nil {
			b.t.Fatal(err)
		}
	}
}

// listSandboxes does what kubelet does before it lists containers to learn what its pods are.
// Nothing takes part in that call.
func (b *bed) listSandboxes() {
	b.t.Helper()
	if b.director.Unary(runtimeapi.RuntimeService_ListPodSandbox_FullMethodName) != nil {
		b.t.Error("ListPodSandbox is intercepted")
	}
}

// inspect begins to look at a whole pod as kubelet does, which asks for the status of its sandbox
// before those of its containers.
func (b *bed) inspect(sandbox string) {
	b.t.Helper()
	method := runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName
	b.on(method, always(&runtimeapi.PodSandboxStatusResponse{}, nil))
	if _, err := call[runtimeapi.PodSandboxStatusResponse](
		b.t.Context(), b, method, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox},
	); err != nil {
		b.t.Fatal(err)
	}
}

func inState(s runtimeapi.ContainerState) *runtimeapi.ContainerFilter {
	return &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: s}}
}

func TestListContainersShowsTheVirtualState(t *testing.T) {
	cases := []struct {
		name   string
		filter *runtimeapi.ContainerFilter
		want   string
	}{
		{"no filter", nil, "old RUNNING, web RUNNING, web-before EXITED"},
		{"empty filter", &runtimeapi.ContainerFilter{}, "old RUNNING, web RUNNING, web-before EXITED"},
		{"running", inState(runtimeapi.ContainerState_CONTAINER_RUNNING), "old RUNNING, web RUNNING"},
		{"exited", inState(runtimeapi.ContainerState_CONTAINER_EXITED), "web-before EXITED"},
		{"created", inState(runtimeapi.ContainerState_CONTAINER_CREATED), ""},
		{"unknown", inState(runtimeapi.ContainerState_CONTAINER_UNKNOWN), ""},
		{"id of the masked one", &runtimeapi.ContainerFilter{Id: incumbent}, "old RUNNING"},
		{"prefix of the masked one", &runtimeapi.ContainerFilter{Id: incumbent[:4]}, "old RUNNING"},
		{"id of the hidden one", &runtimeapi.ContainerFilter{Id: successor}, ""},
		{"prefix of the hidden one", &runtimeapi.ContainerFilter{Id: successor[:4]}, ""},
		{"sandbox", &runtimeapi.ContainerFilter{PodSandboxId: sandbox}, "old RUNNING, web RUNNING, web-before EXITED"},
		{"another sandbox", &runtimeapi.ContainerFilter{PodSandboxId: "9"}, ""},
		{"labels", &runtimeapi.ContainerFilter{LabelSelector: labels("app")}, "old RUNNING"},
		{
			"everything at once",
			&runtimeapi.ContainerFilter{
				Id: incumbent, PodSandboxId: sandbox, LabelSelector: labels("app"),
				State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			},
			"old RUNNING",
		},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.serveList()
			c := b.swapping()
			defer c.Release()

			resp, err := call[runtimeapi.ListContainersResponse](
				t.Context(), b, methodList, &runtimeapi.ListContainersRequest{Filter: tc.filter},
			)
			if err != nil {
				t.Fatal(err)
			}
			if got := show(resp.GetContainers()); got != tc.want {
				t.Errorf("list shows %q, want %q", got, tc.want)
			}

			up, filter := b.stream(methodStreamList, &runtimeapi.StreamContainersRequest{Filter: tc.filter})
			sent := &runtimeapi.StreamContainersRequest{}
			if err := proto.Unmarshal(up, sent); err != nil {
				t.Fatal(err)
			}
			var streamed []*runtimeapi.Container
			for _, c := range list(containers(), sent.GetFilter()) { // one a message, as small as it gets
				for _, m := range through(t, filter,
					&runtimeapi.StreamContainersResponse{Containers: []*runtimeapi.Container{c}}) {
					streamed = append(streamed, m.GetContainers()...)
				}
			}
			if got := show(streamed); got != tc.want {
				t.Errorf("stream shows %q, want %q", got, tc.want)
			}
		})
	}
}

// The token alone hides a container: after a crash its ID is not known.
func TestListContainersHidesByToken(t *testing.T) {
	b := newBed(t)
	b.serveList()
	c := b.claimed()
	defer c.Release()
	c.HideNow(token)
	resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
		&runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := show(resp.GetContainers()), "old EXITED, web RUNNING, web-before EXITED"; got != want {
		t.Errorf("list shows %q, want %q", got, want)
	}
}

// Kubelets that ask in the order of the list come to the successor first, whatever the runtime's
// order is.
func TestRevealedIsListedBeforeItsIncumbent(t *testing.T) {
	for name, order := range map[string]func([]*runtimeapi.Container){
		"as it is": func([]*runtimeapi.Container) {}, "turned round": slices.Reverse[[]*runtimeapi.Container],
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
				all := containers()
				order(all)
				return &runtimeapi.ListContainersResponse{Containers: all}, nil
			})
			c := b.swapping()
			c.Reveal()
			c.Release()
			resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Fatal(err)
			}
			at := func(id string) int {
				return slices.IndexFunc(resp.GetContainers(),
					func(c *runtimeapi.Container) bool { return c.GetId() == id })
			}
			if len(resp.GetContainers()) != len(containers()) || at(successor) < 0 || at(successor) > at(incumbent) {
				t.Errorf("the list is %v", resp.GetContainers())
			}
		})
	}
}

// So it is for a container that was replaced twice before kubelet looked.
func TestRevealedTwiceIsListedNewestFirst(t *testing.T) {
	for range 20 { // whichever pair comes first
		b := newBed(t)
		b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
			return &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{Id: "0"}, {Id: "1"},
				{Id: "2"}}}, nil
		})
		for _, next := range []string{"1", "2"} {
			c, err := b.view.TryClaim(slot)
			if err != nil {
				t.Fatal(err)
			}
			c.Bind(sandbox, map[string]string{"1": "0", "2": "1"}[next])
			c.HideNow(next)
			c.Staged(next)
			c.Mask()
			c.Reveal()
			c.Release()
		}
		resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
			&runtimeapi.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, c := range resp.GetContainers() {
			ids = append(ids, c.GetId())
		}
		if got := strings.Join(ids, " "); got != "2 1 0" {
			t.Fatalf("the list is %s", got)
		}
	}
}

// PLEG looks at a pod again only when its list has changed. A round that had listed the sandboxes
// before a reveal must not be told by the list what the statuses do not say yet: kubelet would go
// by the incumbent's status for as long as the pod stays as it is.
func TestRevealWithinARound(t *testing.T) {
	b := newBed(t)
	b.serveList()
	b.serveStatus()
	listed := func() string {
		resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
			&runtimeapi.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return show(resp.GetContainers())
	}
	streamed := func() (out string) {
		_, filter := b.stream(methodStreamList, &runtimeapi.StreamContainersRequest{})
		for _, m := range through(t, filter, &runtimeapi.StreamContainersResponse{Containers: containers()}) {
			out = show(m.GetContainers())
		}
		return out
	}
	const (
		before = "old RUNNING, web RUNNING, web-before EXITED"
		after  = "new CREATED, old EXITED, web RUNNING, web-before EXITED"
	)
	c := b.swapping()
	b.listSandboxes()
	c.Reveal()
	c.Release()
	for name, got := range map[string]string{"list": listed(), "stream": streamed()} {
		if got != before {
			t.Errorf("in the round of the reveal the %s shows %q, want %q", name, got, before)
		}
	}
	b.inspect(sandbox)
	resp, err := call[runtimeapi.ContainerStatusResponse](
		t.Context(), b, methodStatus, &runtimeapi.ContainerStatusRequest{ContainerId: incumbent},
	)
	if err != nil {
		t.Fatal(err)
	}
	if s := resp.GetStatus(); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("in the round of the reveal the incumbent is %s", s.GetState())
	}
	b.listSandboxes()
	for name, got := range map[string]string{"list": listed(), "stream": streamed()} {
		if got != after {
			t.Errorf("in the next round the %s shows %q, want %q", name, got, after)
		}
	}
}

// What the list shows after each step of an operation, ending in each way.
func TestListContainersStepByStep(t *testing.T) {
	const (
		untouched = "new CREATED, old EXITED, web RUNNING, web-before EXITED"
		before    = "old EXITED, web RUNNING, web-before EXITED"
	)
	steps := map[string]struct {
		do   func(*testing.T, *view.Claim)
		want string
	}{
		"claim":    {func(*testing.T, *view.Claim) {}, untouched},
		"mask too": {func(_ *testing.T, c *view.Claim) { c.Mask() }, untouched}, // speaks only once it hides
		"hide": {func(t *testing.T, c *view.Claim) {
			if err := c.Hide(t.Context(), token); err != nil {
				t.Fatal(err)
			}
		}, before},
		"mask": {func(
			_ *testing.T, c *view.Claim,
		) {
			c.Mask()
		}, "old RUNNING, web RUNNING, web-before EXITED"},
		"staged": {func(_ *testing.T, c *view.Claim) { c.Staged(successor) }, before},
		"another token": {func(
			_ *testing.T, c *view.Claim,
		) {
			c.HideNow("fresh")
		}, "old RUNNING, web RUNNING, web-before EXITED"},
		"and forget the old": {func(
			_ *testing.T, c *view.Claim,
		) {
			c.Staged("")
		}, "new CREATED, old RUNNING, web RUNNING, web-before EXITED"},
		"reveal":  {func(_ *testing.T, c *view.Claim) { c.Reveal() }, untouched},
		"discard": {func(_ *testing.T, c *view.Claim) { c.Discard() }, untouched},
		"release": {func(_ *testing.T, c *view.Claim) { c.Release() }, untouched},
		"reveal if it may be": {func(t *testing.T, c *view.Claim) {
			if !c.TryReveal() {
				t.Error("not revealed")
			}
		}, untouched},
	}
	for name, course := range map[string][]string{
		"success":         {"claim", "hide", "staged", "mask", "reveal", "release"},
		"unless yielded":  {"claim", "hide", "staged", "mask", "reveal if it may be", "release"},
		"discard":         {"claim", "hide", "staged", "discard", "release"},
		"only release":    {"claim", "hide", "mask", "release"},
		"second stage":    {"claim", "hide", "staged", "mask", "another token", "and forget the old", "discard"},
		"mask first":      {"claim", "mask too", "release"},
		"all ends at all": {"claim", "hide", "mask", "reveal", "discard", "release", "release", "reveal"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.serveList()
			b.serveStatus()
			c := b.claimed()
			for _, step := range course {
				steps[step].do(t, c)
				resp, err := call[runtimeapi.ListContainersResponse](
					t.Context(), b, methodList, &runtimeapi.ListContainersRequest{},
				)
				if err != nil {
					t.Fatal(err)
				}
				if got := show(resp.GetContainers()); got != steps[step].want {
					t.Errorf("after %s the list shows %q, want %q", step, got, steps[step].want)
				}
			}
			c.Release()
			b.readAll()
			if b.view.Active() {
				t.Error("the view still has something to say")
			}
			c2, err := b.view.TryClaim(slot)
			if err != nil {
				t.Fatal(err)
			}
			c2.Release()
		})
	}
}

// A list that the runtime made in the middle of a swap and that is answered after
// the reveal must not show a created container, nor the exited one alone.
func TestAnswersAcrossAReveal(t *testing.T) {
	for name, end := range map[string]func(*view.Claim){
		"reveal":  (*view.Claim).Reveal,
		"discard": (*view.Claim).Discard,
		"release": (*view.Claim).Release,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			c := b.swapping()
			defer c.Release()
			// Another operation keeps the view active.
			other, err := b.view.TryClaim(view.Slot{PodUID: "uid-2", Container: "x"})
			if err != nil {
				t.Fatal(err)
			}
			defer other.Release()
			other.HideNow("x")

			_, filter := b.stream(methodStreamList, &runtimeapi.StreamContainersRequest{})
			b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
				end(c)
				return &runtimeapi.ListContainersResponse{Containers: containers()}, nil
			})
			const want = "old RUNNING, web RUNNING, web-before EXITED"
			resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
				&runtimeapi.ListContainersRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if got := show(resp.GetContainers()); got != want {
				t.Errorf("list shows %q, want %q", got, want)
			}
			for _, m := range through(t, filter, &runtimeapi.StreamContainersResponse{Containers: containers()}) {
				if got := show(m.GetContainers()); got != want {
					t.Errorf("stream shows %q, want %q", got, want)
				}
			}
		})
	}
	t.Run("a whole operation within the call", func(t *testing.T) {
		b := newBed(t)
		other, err := b.view.TryClaim(view.Slot{PodUID: "uid-2", Container: "x"})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Release()
		other.HideNow("x") // else the operation would wait for this call
		b.on(methodList, func(context.Context, []byte) (proto.Message, error) {
			c := b.swapping()
			made := containers()
			c.Release()
			return &runtimeapi.ListContainersResponse{Containers: made}, nil
		})
		resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
			&runtimeapi.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := show(resp.GetContainers()), "old RUNNING, web RUNNING, web-before EXITED"; got != want {
			t.Errorf("list shows %q, want %q", got, want)
		}
	})
}

func TestListContainersKeepsUnknownFields(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	b.on(methodList, func(_ context.Context, raw []byte) (proto.Message, error) {
		req := &runtimeapi.ListContainersRequest{}
		if err := proto.Unmarshal(raw, req); err != nil {
			return nil, err
		}
		wantUnknown(t, "request", req)
		wantUnknown(t, "filter", req.GetFilter())
		m := withUnknown(&runtimeapi.ListContainersResponse{Containers: containers()})
		for _, c := range m.Containers {
			withUnknown(c)
		}
		return m, nil
	})
	resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
		withUnknown(
			&runtimeapi.ListContainersRequest{
				Filter: withUnknown(inState(runtimeapi.ContainerState_CONTAINER_RUNNING))},
		))
	if err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, "response", resp)
	for _, c := range resp.GetContainers() {
		wantUnknown(t, c.GetId(), c)
	}
}

// The runtime's containers other than state must come through as they are.
func TestListContainersChangesStateOnly(t *testing.T) {
	b := newBed(t)
	b.serveList()
	c := b.swapping()
	defer c.Release()
	resp, err := call[runtimeapi.ListContainersResponse](t.Context(), b, methodList,
		&runtimeapi.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	real := map[string]*runtimeapi.Container{}
	for _, c := range containers() {
		real[c.GetId()] = c
	}
	for _, c := range resp.GetContainers() {
		r := real[c.GetId()]
		r.State = c.GetState()
		if !proto.Equal(c, r) || !maps.Equal(c.GetLabels(), r.GetLabels()) {
			t.Errorf("got %v, want %v", c, r)
		}
	}
}
