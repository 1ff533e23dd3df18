// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

const methodEvents = runtimeapi.RuntimeService_GetContainerEvents_FullMethodName

func event(
	id string, what runtimeapi.ContainerEventType, statuses ...*runtimeapi.ContainerStatus,
) *runtimeapi.ContainerEventResponse {
	return &runtimeapi.ContainerEventResponse{ContainerId: id, ContainerEventType: what, ContainersStatuses: statuses}
}

func brief(e *runtimeapi.ContainerEventResponse) string {
	return names[e.GetContainerId()] + " " + strings.TrimSuffix(
		strings.TrimPrefix(e.GetContainerEventType().String(), "CONTAINER_"), "_EVENT",
	)
}

// sent returns what kubelet gets at once.
func sent(t *testing.T, f proxy.StreamFilter, e *runtimeapi.ContainerEventResponse) string {
	t.Helper()
	var out []string
	for _, m := range through(t, f, e) {
		out = append(out, brief(m))
	}
	return strings.Join(out, ", ")
}

// extra returns what kubelet gets out of turn.
func extra(t *testing.T, f proxy.StreamFilter) string {
	t.Helper()
	var out []string
	for {
		select {
		case b := <-f.Extra():
			m := &runtimeapi.ContainerEventResponse{}
			if err := proto.Unmarshal(b, m); err != nil {
				t.Fatal(err)
			}
			out = append(out, brief(m))
		default:
			return strings.Join(out, ", ")
		}
	}
}

const (
	created = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
	started = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
	stopped = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
)

func TestContainerEventsAreHeldUntilTheReveal(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(*view.Claim)
		want string
	}{
		"reveal":  {(*view.Claim).Reveal, "new CREATED, old STOPPED, new STARTED"},
		"discard": {(*view.Claim).Discard, "old STOPPED"},
		"release": {(*view.Claim).Release, "new CREATED, old STOPPED, new STARTED"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
			if got := sent(t, f, event(web, started)); got != "web STARTED" {
				t.Errorf("an event without any operation: kubelet gets %q", got)
			}
			c := b.claimed()
			defer c.Release()
			if err := c.Hide(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			// Created before anybody can know the ID: the token in the statuses tells.
			steps := []struct {
				e    *runtimeapi.ContainerEventResponse
				want string
			}{
				{event(successor, created, staged()), ""},
				{event(web, stopped), "web STOPPED"},
				{event(incumbent, started), "old STARTED"},
				{event(incumbent, stopped), ""},
				{event(successor, started), ""},
				{event(web, deleted), "web DELETED"},
			}
			for i, s := range steps {
				if i == 1 {
					c.Staged(successor)
					c.Mask()
				}
				if got := sent(t, f, s.e); got != s.want {
					t.Errorf("%s: kubelet gets %q, want %q", brief(s.e), got, s.want)
				}
			}
			if got := extra(t, f); got != "" {
				t.Errorf("before the end kubelet gets %q", got)
			}
			tc.end(c)
			if got := extra(t, f); got != tc.want {
				t.Errorf("kubelet gets %q, want %q", got, tc.want)
			}
			if got := sent(t, f, event(successor, stopped)); got != "new STOPPED" {
				t.Errorf("after the end: kubelet gets %q", got)
			}
		})
	}
}

// Of two stages only the one that is revealed has ever been there for kubelet.
func TestContainerEventsOfAnAbandonedStage(t *testing.T) {
	b := newBed(t)
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	c := b.swapping()
	defer c.Release()
	for _, e := range []*runtimeapi.ContainerEventResponse{
		event(successor, created, staged()), event(successor, deleted),
	} {
		if got := sent(t, f, e); got != "" {
			t.Errorf("kubelet gets %q", got)
		}
	}
	c.HideNow("second")
	c.Staged("dddd")
	if got := sent(t, f, event("dddd", started)); got != "" {
		t.Errorf("kubelet gets %q", got)
	}
	c.Reveal()
	if got := extra(t, f); got != " STARTED" {
		t.Errorf("kubelet gets %q, want the second one's start only", got)
	}
}

func TestContainerEventsShowVirtualStatuses(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	msgs := through(t, f, withUnknown(event(web, stopped, staged(), exited(incumbent), exited(web))))
	if len(msgs) != 1 {
		t.Fatalf("got %d messages", len(msgs))
	}
	wantUnknown(t, "event", msgs[0])
	want := event(web, stopped, running(incumbent), exited(web))
	same := func(a, b *runtimeapi.ContainerStatus) bool { return proto.Equal(a, b) }
	if !slices.EqualFunc(msgs[0].GetContainersStatuses(), want.GetContainersStatuses(), same) {
		t.Errorf("got  %v\nwant %v", msgs[0].GetContainersStatuses(), want.GetContainersStatuses())
	}
}

func TestContainerEventsOfSeveralStreamsAndClaims(t *testing.T) {
	b := newBed(t)
	_, one := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	_, two := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	app := b.swapping()
	defer app.Release()
	other, err := b.view.TryClaim(view.Slot{PodUID: "uid-1", Container: "web"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Release()
	other.Bind(sandbox, web)
	other.HideNow("other")
	other.Mask()
	for _, f := range []proxy.StreamFilter{one, two} {
		sent(t, f, event(web, stopped))
		sent(t, f, event(incumbent, stopped))
	}
	other.Reveal()
	for _, f := range []proxy.StreamFilter{one, two} {
		if got := extra(t, f); got != "web STOPPED" {
			t.Errorf("kubelet gets %q, want only that claim's", got)
		}
	}
	app.Reveal()
	for _, f := range []proxy.StreamFilter{one, two} {
		if got := extra(t, f); got != "old STOPPED" {
			t.Errorf("kubelet gets %q", got)
		}
	}
}

// An event tells of all containers of the pod. When it is released, those of another operation are
// still not to be seen, and the start of the successor is known.
func TestContainerEventsHeldTellWhatIsShownNow(t *testing.T) {
	b := newBed(t)
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	app := b.swapping()
	defer app.Release()
	other, err := b.view.TryClaim(view.Slot{PodUID: "uid-1", Container: "web"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Release()
	other.Bind(sandbox, web)
	other.HideNow("other")
	other.Staged("dddd")
	other.Mask()
	began := time.Unix(1000, 5)
	status := func(startedAt int64) *runtimeapi.ContainerStatus {
		s := running(successor)
		s.StartedAt = startedAt
		return s
	}
	hiddenByID, hiddenByToken := running("dddd"), running("eeee")
	hiddenByToken.Annotations = map[string]string{view.StagedAnnotation: "other"}
	e := event(successor, started, status(900), exited(incumbent), exited(web), hiddenByID, hiddenByToken)
	if got := sent(t, f, withUnknown(e)); got != "" {
		t.Fatalf("kubelet gets %q", got)
	}
	b.view.SetStarted(successor, began)
	app.Reveal()
	got := &runtimeapi.ContainerEventResponse{}
	if err := proto.Unmarshal(<-f.Extra(), got); err != nil {
		t.Fatal(err)
	}
	want := withUnknown(event(successor, started, status(began.UnixNano()), exited(incumbent), running(web)))
	if !proto.Equal(got, want) {
		t.Errorf("kubelet gets %v\nwant %v", got, want)
	}
}

// A caller that does not read must not make the proxy grow without bound; kubelet relists.
func TestContainerEventsHeldAreBounded(t *testing.T) {
	b := newBed(t)
	c := b.swapping()
	defer c.Release()
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	const many = 3000
	for range many {
		sent(t, f, event(successor, created))
	}
	sent(t, f, event(successor, started))
	c.Reveal()
	got := strings.Split(extra(t, f), ", ")
	if len(got) >= many || got[len(got)-1] != "new STARTED" {
		t.Errorf("%d held events, the last is %q; want fewer than %d, and the newest", len(got), got[len(got)-1], many)
	}
}

func TestContainerEventsThatCannotBeDecodedAreAFault(t *testing.T) {
	b := newBed(t)
	_, f := b.stream(methodEvents, &runtimeapi.GetEventsRequest{})
	garbage := []byte{0xff}
	if out, err := f.Message(garbage); err != nil || len(out) != 1 || string(out[0]) != string(garbage) {
		t.Errorf("inactive: got %v, %v; want the message as it is", out, err)
	}
	c := b.swapping()
	defer c.Release()
	_, err := f.Message(garbage)
	wantPass(t, err)
}
