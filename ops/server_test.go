// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops"
)

func httpHook(scheme string, port int32) *opsv1.Hook {
	return &opsv1.Hook{
		Action: &opsv1.Hook_HttpGet{HttpGet: &opsv1.HTTPGetAction{Scheme: scheme, Port: port, Path: "/"}}}
}

func TestRequestsAreChecked(t *testing.T) {
	long := func(n int) string { return strings.Repeat("a", n) }
	first := func(f func(*opsv1.ContainerRestart)) func(*opsv1.RestartRequest) {
		return func(r *opsv1.RestartRequest) { f(r.Containers[0]) }
	}
	preStop := func(h *opsv1.Hook) func(*opsv1.RestartRequest) {
		return first(func(c *opsv1.ContainerRestart) { c.PreStop = h })
	}
	cases := []struct {
		name   string
		edit   func(*opsv1.RestartRequest)
		remote bool
		want   string // empty: fine
	}{
		{name: "as is", edit: func(*opsv1.RestartRequest) {}},
		{name: "remote", edit: func(*opsv1.RestartRequest) {}, remote: true},
		{name: "no uid", edit: func(r *opsv1.RestartRequest) { r.Uid = "" }, want: "uid must be 1 to 128 characters"},
		{name: "long uid", edit: func(r *opsv1.RestartRequest) { r.Uid = long(129) },
			want: "uid must be 1 to 128 characters"},
		{name: "longest uid", edit: func(r *opsv1.RestartRequest) { r.Uid = long(128) }},
		{name: "odd uid", edit: func(r *opsv1.RestartRequest) { r.Uid = "a/b\n" },
			want: `uid must be 1 to 128 characters of [A-Za-z0-9._-], not "a/b\n"`},
		{name: "no pod", edit: func(r *opsv1.RestartRequest) { r.Pod = nil },
			want: "pod.namespace and pod.name must be Kubernetes names"},
		{name: "no namespace", edit: func(r *opsv1.RestartRequest) { r.Pod.Namespace = "" },
			want: "pod.namespace and pod.name must be Kubernetes names"},
		{name: "odd name", edit: func(r *opsv1.RestartRequest) { r.Pod.Name = "A" },
			want: "pod.namespace and pod.name must be Kubernetes names"},
		{name: "no pod uid on the node", edit: func(r *opsv1.RestartRequest) { r.Pod.Uid = "" }},
		{name: "no pod uid from afar", edit: func(r *opsv1.RestartRequest) { r.Pod.Uid = "" }, remote: true,
			want: "pod.uid is required"},
		{name: "long pod uid", edit: func(r *opsv1.RestartRequest) { r.Pod.Uid = long(129) },
			want: "pod.uid is too long"},
		{name: "no containers", edit: func(r *opsv1.RestartRequest) { r.Containers = nil },
			want: "containers is empty"},
		{name: "many containers", edit: func(r *opsv1.RestartRequest) {
			for i := range ops.MaxContainers {
				r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: fmt.Sprint("c", i)})
			}
		}, want: "65 containers are too many"},
		{name: "long requester", edit: func(r *opsv1.RestartRequest) { r.Requester = long(1025) },
			want: "requester is too long"},
		{name: "container without a name", edit: first(func(c *opsv1.ContainerRestart) { c.Name = "" }),
			want: `container name "" is not`},
		{name: "a nil container", edit: func(r *opsv1.RestartRequest) { r.Containers[0] = nil },
			want: `container name "" is not`},
		{name: "container twice", edit: func(r *opsv1.RestartRequest) {
			r.Containers = append(r.Containers, &opsv1.ContainerRestart{Name: "app"})
		}, want: `container "app" is named twice`},
		{name: "negative grace",
			edit: first(func(c *opsv1.ContainerRestart) { c.GracePeriodSeconds = proto.Int64(-1) }),
			want: "grace_period_seconds must be between 0 and 86400"},
		{name: "endless grace",
			edit: first(func(c *opsv1.ContainerRestart) { c.GracePeriodSeconds = proto.Int64(1 << 40) }),
			want: "grace_period_seconds must be between 0 and 86400"},
		{name: "no grace", edit: first(func(c *opsv1.ContainerRestart) { c.GracePeriodSeconds = proto.Int64(0) })},
		{name: "long expected ID", edit: first(func(c *opsv1.ContainerRestart) { c.ExpectedContainerId = long(257) }),
			want: "expected_container_id is too long"},
		{name: "hook without action", edit: preStop(&opsv1.Hook{}),
			want: `container "app": pre_stop: the hook has no action`},
		{name: "postStart without action", edit: first(func(c *opsv1.ContainerRestart) { c.PostStart = &opsv1.Hook{} }),
			want: `container "app": post_start: the hook has no action`},
		{name: "exec without command", edit: preStop(execHook()),
			want: "exec.command must have between 1 and 256 words"},
		{name: "exec with too many words", edit: preStop(execHook(make([]string, 257)...)),
			want: "exec.command must have between 1 and 256 words"},
		{name: "huge hook", edit: preStop(execHook(long(ops.MaxHookBytes))), want: "the hook is too large"},
		{name: "port 0", edit: preStop(httpHook("", 0)), want: "http_get.port must be between 1 and 65535"},
		{name: "port 65536", edit: preStop(httpHook("", 65536)), want: "http_get.port must be between 1 and 65535"},
		{name: "odd scheme", edit: preStop(httpHook("ftp", 80)), want: "http_get.scheme must be HTTP or HTTPS"},
		{name: "good http", edit: preStop(httpHook("HTTPS", 443))},
		{name: "negative sleep",
			edit: preStop(&opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: -1}}}),
			want: "sleep.seconds is out of range"},
		{name: "endless sleep",
			edit: preStop(&opsv1.Hook{Action: &opsv1.Hook_Sleep{Sleep: &opsv1.SleepAction{Seconds: 1 << 40}}}),
			want: "sleep.seconds is out of range"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			req := restartRequest("op", tc.edit)
			err := ops.ValidateRestart(req, tc.remote)
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want InvalidArgument: %s", err, tc.want)
			}
		})
	}
}

// serveOps serves the node's commands on a Unix socket.
func serveOps(t *testing.T, n *node) opsv1.OpsClient {
	t.Helper()
	path := filepath.Join(n.dir, "ops.sock")
	l, err := net.Listen("unix", path)
	n.must(err)
	s := grpc.NewServer()
	opsv1.RegisterOpsServer(s, n.api)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(l); err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	n.must(err)
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		s.Stop()
		served.Wait()
	})
	return opsv1.NewOpsClient(conn)
}

func TestCommandsOverTheSocket(t *testing.T) {
	n := newNode(t, podOptions{})
	n.runTidied()
	client := serveOps(t, n)
	reached, release := n.hold("StopContainer app/0")
	op, err := client.Restart(t.Context(), restartRequest("op"))
	n.must(err)
	if op.GetUid() != "op" || op.GetFinishTime() != nil {
		t.Errorf("accepted as %v", op)
	}
	<-reached
	info, err := client.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	n.must(err)
	if len(info.GetActiveSlots()) != 1 || info.GetActiveSlots()[0].GetContainer() != "app" ||
		info.GetActiveSlots()[0].GetPhase() != opsv1.Phase_PHASE_STOPPING {
		t.Errorf("active slots are %v", info.GetActiveSlots())
	}
	active, err := client.ListOperations(t.Context(), &opsv1.ListOperationsRequest{ActiveOnly: true, Limit: 1})
	n.must(err)
	if len(active.GetOperations()) != 1 {
		t.Errorf("active operations are %v", active)
	}
	watch, err := client.WatchOperation(t.Context(), &opsv1.WatchOperationRequest{Uid: "op"})
	n.must(err)
	phase := opsv1.Phase_PHASE_UNSPECIFIED
	for first := true; ; first = false {
		op, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if op.GetPhase() < phase {
			t.Errorf("phase goes back from %s to %s", phase, op.GetPhase())
		}
		phase = op.GetPhase()
		if first {
			release()
		}
		if op.GetFinishTime() != nil {
			break
		}
	}
	if phase != opsv1.Phase_PHASE_SUCCEEDED {
		t.Errorf("ended %s", phase)
	}
	if _, err := watch.Recv(); err == nil || status.Code(err) == codes.Canceled {
		t.Errorf("the watch does not end by itself: %v", err)
	}
	_, err = client.Restart(t.Context(), restartRequest(""))
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("an empty UID: %v", err)
	}
	for name, do := range map[string]func() error{
		"get": func() error {
			_, err := client.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: "nope"})
			return err
		},
		"cancel": func() error {
			_, err := client.CancelOperation(t.Context(), &opsv1.CancelOperationRequest{Uid: "nope"})
			return err
		},
		"watch": func() error {
			w, err := client.WatchOperation(t.Context(), &opsv1.WatchOperationRequest{Uid: "nope"})
			if err == nil {
				_, err = w.Recv()
			}
			return err
		},
	} {
		if err := do(); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), `no operation "nope"`) {
			t.Errorf("%s of an unknown operation: %v", name, err)
		}
	}
	for _, limit := range []int32{-1, ops.ListDefault + 1} {
		if _, err := client.ListOperations(t.Context(), &opsv1.ListOperationsRequest{Limit: limit}); status.Code(
			err) != codes.InvalidArgument {
			t.Errorf("limit %d: %v", limit, err)
		}
	}
	if _, err := client.CancelOperation(t.Context(),
		&opsv1.CancelOperationRequest{Uid: "op", Reason: strings.Repeat("a", ops.MaxHookBytes+1)}); status.Code(
		err) != codes.InvalidArgument {
		t.Errorf("a long reason: %v", err)
	}
}

func TestWatchEndsWithItsCaller(t *testing.T) {
	n := newNode(t, podOptions{}) // Run never begins
	client := serveOps(t, n)
	n.restart("op")
	ctx, cancel := context.WithCancel(t.Context())
	watch, err := client.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: "op"})
	n.must(err)
	if op, err := watch.Recv(); err != nil || op.GetPhase() != opsv1.Phase_PHASE_PENDING {
		t.Errorf("got %v, %v", op, err)
	}
	cancel()
	if _, err := watch.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
}
