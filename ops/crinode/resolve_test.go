// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package crinode_test

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

// fakeRuntime lists its sandboxes and containers.
type fakeRuntime struct {
	runtimeapi.RuntimeServiceClient
	sandboxes  []*runtimeapi.PodSandbox
	containers []*runtimeapi.Container
}

func (f *fakeRuntime) ListPodSandbox(
	_ context.Context, r *runtimeapi.ListPodSandboxRequest, _ ...grpc.CallOption,
) (*runtimeapi.ListPodSandboxResponse, error) {
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, s := range f.sandboxes {
		want, has := r.GetFilter().GetLabelSelector(), maps.Clone(s.GetLabels())
		maps.DeleteFunc(has, func(k, v string) bool { return want[k] != v })
		if maps.Equal(want, has) {
			resp.Items = append(resp.Items, s)
		}
	}
	return resp, nil
}

func (f *fakeRuntime) ListContainers(
	_ context.Context, r *runtimeapi.ListContainersRequest, _ ...grpc.CallOption,
) (*runtimeapi.ListContainersResponse, error) {
	resp := &runtimeapi.ListContainersResponse{}
	for _, c := range f.containers {
		if c.GetPodSandboxId() == r.GetFilter().GetPodSandboxId() {
			resp.Containers = append(resp.Containers, c)
		}
	}
	return resp, nil
}

func podLabels() map[string]string {
	return map[string]string{
		criclone.LabelPodNamespace: "default", criclone.LabelPodName: "shop", criclone.LabelPodUID: "u1",
	}
}

// newFake returns a runtime with the pod default/shop: container app in its second attempt, and web
// and job beside it, of which job has ended. The pod had another sandbox before.
func newFake() *fakeRuntime {
	const running, exited = runtimeapi.ContainerState_CONTAINER_RUNNING, runtimeapi.ContainerState_CONTAINER_EXITED
	container := func(id, name string, at int64, state runtimeapi.ContainerState,
		restarts string) *runtimeapi.Container {
		return &runtimeapi.Container{
			Id: id, PodSandboxId: "new", CreatedAt: at, State: state,
			Metadata:    &runtimeapi.ContainerMetadata{Name: name},
			Labels:      map[string]string{criclone.LabelContainer: name},
			Annotations: map[string]string{criclone.AnnotationRestartCount: restarts},
		}
	}
	return &fakeRuntime{
		sandboxes: []*runtimeapi.PodSandbox{
			{Id: "gone", CreatedAt: 9, State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY, Labels: podLabels()},
			{Id: "old", CreatedAt: 1, Labels: podLabels()},
			{Id: "new", CreatedAt: 2, Labels: podLabels()},
		},
		containers: []*runtimeapi.Container{
			container("a1", "app", 2, running, "4"), container("a0", "app", 1, exited, "garbage"),
			container("w0", "web", 1, running, "0"), container("j0", "job", 1, exited, "0"),
		},
	}
}

func TestResolve(t *testing.T) {
	app := &opsv1.ContainerRestart{Name: "app"}
	expect := func(id string) *opsv1.ContainerRestart {
		return &opsv1.ContainerRestart{Name: "app", ExpectedContainerId: id}
	}
	for _, tt := range []struct {
		name   string
		pod    *opsv1.PodRef // nil: default/shop
		want   *opsv1.ContainerRestart
		force  bool
		edit   func(*fakeRuntime)
		reason string // of the failure; empty: the newest container of app
		says   string
	}{
		{name: "by name", want: app},
		{name: "by UID", want: app, pod: &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: "u1"}},
		{name: "the expected one", want: expect("a1")},
		{name: "the expected one, as the API server shows it", want: expect("containerd://a1")},
		{name: "a scheme without an ID", want: expect("://")},
		{name: "another one is expected", want: expect("a0"), reason: "ExpectedIDDiffers", says: "is a1 now, not a0"},
		{
			name: "another one is expected, with a scheme", want: expect("containerd://a"),
			reason: "ExpectedIDDiffers", says: "not a:",
		},
		{name: "another one is expected, with force", want: expect("a0"), force: true},
		{
			name: "no such pod", want: app, pod: &opsv1.PodRef{Namespace: "default", Name: "other"},
			reason: "NotFound", says: "no pod default/other runs on this node",
		},
		{
			name: "another UID", want: app, pod: &opsv1.PodRef{Namespace: "default", Name: "shop", Uid: "u2"},
			reason: "NotFound", says: "no pod default/shop with UID u2",
		},
		{
			name: "the pod goes away", want: app, edit: func(f *fakeRuntime) { f.sandboxes = f.sandboxes[:1] },
			reason: "PodStopping", says: "pod default/shop has no running sandbox",
		},
		{
			name: "no such container", want: &opsv1.ContainerRestart{Name: "db"},
			reason: "NotFound", says: `pod default/shop has no container "db"; running are: app, web`,
		},
		{
			name: "not running", want: &opsv1.ContainerRestart{Name: "job"},
			reason: "ContainerNotRunning", says: `container "job" is not running (exited)`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, pod := newFake(), tt.pod
			if tt.edit != nil {
				tt.edit(f)
			}
			if pod == nil {
				pod = &opsv1.PodRef{Namespace: "default", Name: "shop"}
			}
			got, err := (&crinode.Client{Runtime: f}).Resolve(t.Context(), pod, tt.want, tt.force)
			if tt.reason != "" {
				var failure *operation.Outcome
				if !errors.As(err, &failure) || failure.Reason != tt.reason ||
					!strings.Contains(failure.Message, tt.says) {
					t.Errorf("got %v, want a failure %s: %s", err, tt.reason, tt.says)
				}
				return
			}
			if want := (crinode.Target{Sandbox: "new", Incumbent: "a1", Attempt: 5}); err != nil || *got != want {
				t.Errorf("got %+v, %v, want %+v", got, err, want)
			}
		})
	}
}
