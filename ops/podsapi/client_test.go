// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podsapi

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// waitLong bounds every wait of a test; reaching it is a failure.
const waitLong = 2 * time.Minute

// patient returns a client that gives an answer the time that it takes.
func patient(socket string) *Client {
	c := New(socket)
	c.timeout = waitLong
	return c
}

// answerFunc answers GetPod with a pod as kubelet does: v1.Pod#Marshal.
type answerFunc func(ctx context.Context, uid string) ([]byte, error)

// serve serves the API at the socket until stop is called. Without an answer the service is not
// there, as with the gate off.
func serve(t *testing.T, socket string, answer answerFunc) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	if answer != nil {
		s.RegisterService(&grpc.ServiceDesc{
			ServiceName: "v1alpha1.Pods",
			HandlerType: (*any)(nil),
			Methods: []grpc.MethodDesc{
				{MethodName: "GetPod", Handler: func(_ any, ctx context.Context, decode func(any) error,
					_ grpc.UnaryServerInterceptor) (any, error) {
					req := &wrapperspb.StringValue{}
					if err := decode(req); err != nil {
						return nil, err
					}
					raw, err := answer(ctx, req.GetValue())
					return wrapperspb.Bytes(raw), err
				}}},
		}, nil)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	stop = func() { s.Stop(); <-done }
	t.Cleanup(stop)
	return stop
}

func marshal(t *testing.T, pod *corev1.Pod) []byte {
	t.Helper()
	raw, err := pod.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// rich is a pod with much that must not be mistaken for what is looked for.
func rich() *corev1.Pod {
	grace := int64(30)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: "web-0", Namespace: "shop", UID: "u-1", ResourceVersion: "17", CreationTimestamp: metav1.Unix(1, 0),
			DeletionGracePeriodSeconds: &grace,
			Labels:                     map[string]string{"a": "b"},
			OwnerReferences:            []metav1.OwnerReference{{UID: "owner", Name: "web"}},
		},
		Spec: corev1.PodSpec{
			NodeName: "n1", TerminationGracePeriodSeconds: &grace,
			InitContainers: []corev1.Container{{Name: "sidecar", Image: "proxy:v1"}},
			Containers: []corev1.Container{{
				Name: "app", Image: "app:v2", Env: []corev1.EnvVar{{Name: "X", Value: "y"}},
				StartupProbe: &corev1.Probe{InitialDelaySeconds: 1, TimeoutSeconds: 2, PeriodSeconds: 300,
					FailureThreshold: 4},
				LivenessProbe: &corev1.Probe{PeriodSeconds: 5},
			}, {Name: "log", Image: "registry.example/log@sha256:0"}},
			EphemeralContainers: []corev1.EphemeralContainer{
				{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "sh"}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, Message: "m", PodIP: "10.0.0.1",
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Reason: "r"}},
			ContainerStatuses: []corev1.ContainerStatus{
				{Name: "app", Image: "app:v1", ContainerID: "containerd://c1"}},
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "sidecar", ContainerID: "containerd://c0"}},
		},
	}
}

func TestPod(t *testing.T) {
	images := map[string]string{"sidecar": "proxy:v1", "app": "app:v2", "log": "registry.example/log@sha256:0"}
	periods, running := map[string]time.Duration{"app": 5 * time.Minute},
		map[string]string{"app": "containerd://c1", "sidecar": "containerd://c0"}
	for _, tt := range []struct {
		name string
		edit func(*corev1.Pod)
		want Pod
	}{
		{name: "running", edit: func(*corev1.Pod) {},
			want: Pod{UID: "u-1", Phase: "Running", Images: images, StartupPeriods: periods, Running: running}},
		{name: "deleted", edit: func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(2, 0)} },
			want: Pod{UID: "u-1", Deleting: true, Phase: "Running", Images: images, StartupPeriods: periods,
				Running: running}},
		{name: "evicted", edit: func(p *corev1.Pod) { p.Status.Phase, p.Status.Reason = corev1.PodFailed, "Evicted" },
			want: Pod{UID: "u-1", Phase: "Failed", Reason: "Evicted", Images: images,
				StartupPeriods: periods, Running: running}},
		{name: "little", edit: func(p *corev1.Pod) { *p = corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u-1"}} },
			want: Pod{UID: "u-1", Images: map[string]string{}, StartupPeriods: map[string]time.Duration{},
				Running: map[string]string{}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			pod := rich()
			tt.edit(pod)
			serve(t, socket, func(_ context.Context, uid string) ([]byte, error) {
				if uid != string(pod.UID) {
					return nil, status.Errorf(codes.NotFound, "pod with UID %s not found", uid)
				}
				return marshal(t, pod), nil
			})
			got, err := patient(socket).Pod(t.Context(), "u-1")
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(*got, tt.want) {
				t.Errorf("Pod: %+v, want %+v", *got, tt.want)
			}
			if _, err := patient(socket).Pod(t.Context(), "u-2"); !errors.Is(err, ErrNotFound) {
				t.Errorf("another UID: %v, want ErrNotFound", err)
			}
		})
	}
}

func TestUnavailable(t *testing.T) {
	answer := func(code codes.Code) answerFunc {
		return func(context.Context, string) ([]byte, error) { return nil, status.Error(code, "no") }
	}
	for _, tt := range []struct {
		name  string
		serve func(t *testing.T, socket string)
	}{
		{name: "no socket", serve: func(*testing.T, string) {}},
		{name: "gate off", serve: func(t *testing.T, socket string) { serve(t, socket, nil) }},
		{name: "kubelet starts",
			serve: func(t *testing.T, socket string) { serve(t, socket, answer(codes.FailedPrecondition)) }},
		{name: "rate limit",
			serve: func(t *testing.T, socket string) { serve(t, socket, answer(codes.ResourceExhausted)) }},
		{name: "hangs", serve: func(t *testing.T, socket string) {
			serve(t, socket, func(ctx context.Context, _ string) ([]byte, error) {
				<-ctx.Done()
				return nil,
					ctx.Err()
			})
		}},
		{name: "does not even speak", serve: func(t *testing.T, socket string) {
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}},
		{name: "left behind", serve: func(t *testing.T, socket string) {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
		}},
		{name: "not a socket", serve: func(t *testing.T, socket string) {
			if err := os.WriteFile(socket, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			tt.serve(t, socket)
			begin := time.Now()
			if _, err := New(socket).Pod(t.Context(), "u-1"); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Pod: %v, want ErrUnavailable", err)
			}
			if took := time.Since(begin); took > waitLong {
				t.Errorf("the call took %s", took)
			}
		})
	}
}

func TestKubeletRestarts(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	c := patient(socket)
	ask := func() error { _, err := c.Pod(t.Context(), "u-1"); return err }
	for round := range 3 {
		if err := ask(); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("round %d: %v while kubelet is away", round, err)
		}
		stop := serve(t, socket, func(context.Context, string) ([]byte, error) { return marshal(t, rich()), nil })
		if err := ask(); err != nil {
			t.Fatalf("round %d: %v as soon as kubelet is there", round, err)
		}
		stop()
	}
}

func TestPodCallerGone(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	serve(t, socket, func(call context.Context, _ string) ([]byte, error) {
		cancel()
		<-call.Done()
		return nil,
			call.Err()
	})
	if _, err := patient(socket).Pod(ctx, "u-1"); !errors.Is(err, context.Canceled) {
		t.Errorf("Pod: %v, want that of its context", err)
	}
}

func TestPodNonsense(t *testing.T) {
	other := rich()
	other.UID = types.UID("u-9")
	for _, tt := range []struct {
		name, want string
		raw        []byte
	}{
		{name: "another pod", want: `answered about "u-9"`, raw: marshal(t, other)},
		{name: "cut off", want: "is not a pod", raw: marshal(t, rich())[:20]},
		{name: "nothing", want: `answered about ""`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			serve(t, socket, func(context.Context, string) ([]byte, error) { return tt.raw, nil })
			if _, err := patient(socket).Pod(t.Context(), "u-1"); err == nil ||
				!strings.Contains(err.Error(), tt.want) {
				t.Errorf("Pod: %v, want %q", err, tt.want)
			}
		})
	}
}

// FuzzDecodePod: whatever the types of Kubernetes read, we read alike, and nothing makes us panic.
func FuzzDecodePod(f *testing.F) {
	raw, err := rich().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte{0x0a, 0x02, 0x2a, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := decodePod(b); err != nil {
			return
		}
		var want corev1.Pod
		if want.Unmarshal(b) != nil {
			return
		}
		// Encoded anew: Unmarshal takes fields with a wrong wire type and merges in ways of its
		// own.
		clean, err := want.Marshal()
		if err != nil {
			return
		}
		got, err := decodePod(clean)
		if err != nil {
			t.Fatalf("a pod cannot be read: %v", err)
		}
		if got.UID != string(want.UID) || got.Deleting != (want.DeletionTimestamp != nil) ||
			got.Phase != string(want.Status.Phase) || got.Reason != want.Status.Reason {
			t.Fatalf("%+v, want %+v", got, want)
		}
	})
}
