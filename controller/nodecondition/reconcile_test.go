// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodecondition_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/nodecondition"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// answers has the answers of the node to one question after the other.
type answers struct {
	said  []answer
	asked int
}

type answer struct {
	bypass string
	err    error
}

func (a *answers) NodeInfo(_ context.Context, n nodes.Node) (*opsv1.NodeInfoResponse, error) {
	now := a.said[a.asked]
	a.asked++
	if now.err != nil {
		return nil, &nodes.Error{Node: n, Method: "NodeInfo", Err: now.err,
			Silent: status.Code(now.err) == codes.Unavailable}
	}
	return &opsv1.NodeInfoResponse{Bypass: now.bypass}, nil
}

var (
	gone    = answer{err: status.Error(codes.Unavailable, "connection refused")}
	refuses = answer{err: status.Error(codes.PermissionDenied, "unknown client")}
	inPath  = answer{}
	past    = answer{bypass: "since 2026: it has ended 5 times"}
)

func TestReconcile(t *testing.T) {
	for _, tt := range []struct {
		name  string
		ready corev1.ConditionStatus
		said  []answer
		// want is the condition after each answer, "" for none, and the Events and writes of all.
		want   []string
		events []string
		writes int
		state  string
	}{
		{name: "installed", said: []answer{inPath, inPath}, want: []string{"False InPath", "False InPath"},
			writes: 1, state: "in_path"},
		{name: "bypassed and back", said: []answer{inPath, past, past, inPath},
			want: []string{"False InPath", "True Bypassed", "True Bypassed", "False InPath"},
			events: []string{"Warning CRIProxyBypassedBypassed kubelet is led past cri-proxy since 2026: it has " +
				"ended 5 times",
				"Normal CRIProxyBypassedInPath kubelet's calls come through cri-proxy"},
			writes: 3, state: "in_path"},
		{name: "no cri-proxy there", said: []answer{gone, gone, gone, gone}, want: []string{"", "", "", ""},
			state: "none"},
		{name: "it does not answer any more", said: []answer{past, gone, gone, gone, gone, past},
			want: []string{"True Bypassed", "True Bypassed", "True Bypassed", "Unknown NoAnswer",
				"Unknown NoAnswer", "True Bypassed"},
			events: []string{"Warning CRIProxyBypassedBypassed ", "Warning CRIProxyBypassedNoAnswer ",
				"Warning CRIProxyBypassedBypassed "},
			writes: 3, state: "bypassed"},
		{name: "a miss is none", said: []answer{inPath, gone, gone, inPath, gone, gone, inPath},
			want: slices.Repeat([]string{"False InPath"}, 7), writes: 1, state: "in_path"},
		{name: "it refuses", said: []answer{refuses, refuses, refuses}, want: []string{"", "", "Unknown NoAnswer"},
			events: []string{"Warning CRIProxyBypassedNoAnswer "}, writes: 1, state: "silent"},
		{name: "not ready", ready: corev1.ConditionFalse, said: []answer{past}, want: []string{""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.ready == "" {
				tt.ready = corev1.ConditionTrue
			}
			node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{
				Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: tt.ready},
					{Type: "Other", Status: corev1.ConditionTrue, Message: "of somebody else"}},
			}}
			writes := 0
			c := fake.NewClientBuilder().WithObjects(node).WithStatusSubresource(node).
				WithInterceptorFuncs(interceptor.Funcs{
					SubResourcePatch: func(ctx context.Context, c client.Client, name string, o client.Object,
						p client.Patch,
						opts ...client.SubResourcePatchOption) error {
						writes++
						return c.SubResource(name).Patch(ctx, o, p, opts...)
					},
				}).Build()
			log := logrus.New()
			log.SetOutput(io.Discard)
			recorder := events.NewFakeRecorder(10)
			reg := prometheus.NewPedanticRegistry()
			m, err := nodecondition.NewMetrics(reg)
			if err != nil {
				t.Fatal(err)
			}
			asked := &answers{said: tt.said}
			r := &nodecondition.Reconciler{Client: c, Nodes: asked, NodePort: 1, Recorder: recorder, Metrics: m,
				Log: log, Every: time.Minute}
			req := reconcile.Request{NamespacedName: types.NamespacedName{Name: "n"}}
			for i, want := range tt.want {
				result, err := r.Reconcile(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				if lo, hi := 54*time.Second, 66*time.Second*6; result.RequeueAfter < lo || result.RequeueAfter > hi {
					t.Errorf("asked again after %s", result.RequeueAfter)
				}
				var now corev1.Node
				if err := c.Get(t.Context(), req.NamespacedName, &now); err != nil {
					t.Fatal(err)
				}
				got, others := "", 0
				for _, c := range now.Status.Conditions {
					switch {
					case c.Type == nodes.BypassedCondition:
						got = fmt.Sprintf("%s %s", c.Status, c.Reason)
						if c.LastTransitionTime.IsZero() || c.LastHeartbeatTime.IsZero() {
							t.Errorf("no times: %+v", c)
						}
					case c.Type == corev1.NodeReady && c.Status == tt.ready || c.Message == "of somebody else":
						others++
					}
				}
				if got != want {
					t.Errorf("after answer %d the condition is %q, want %q", i, got, want)
				}
				if others != 2 {
					t.Errorf("conditions of others: %v", now.Status.Conditions)
				}
			}
			if tt.ready != corev1.ConditionTrue && asked.asked > 0 {
				t.Error("a node that is not ready was asked")
			}
			if writes != tt.writes {
				t.Errorf("%d writes, want %d", writes, tt.writes)
			}
			close(recorder.Events)
			var got []string
			for e := range recorder.Events {
				got = append(got, e)
			}
			if len(got) != len(tt.events) {
				t.Fatalf("events %q, want %q", got, tt.events)
			}
			for i, want := range tt.events {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("event %q, want %q", got[i], want)
				}
			}
			want := "# HELP criproxy_controller_nodes Nodes, by what is known of their cri-proxy: in_path, bypassed, " +
				"silent " +
				"(it does not answer any more), none (it never has).\n# TYPE criproxy_controller_nodes gauge\n"
			for _, state := range []string{"bypassed", "in_path", "none", "silent"} {
				n := 0
				if state == tt.state {
					n = 1
				}
				want += fmt.Sprintf("criproxy_controller_nodes{state=%q} %d\n", state, n)
			}
			if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "criproxy_controller_nodes"); err != nil {
				t.Error(err)
			}
			if err := c.Delete(t.Context(), node); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Reconcile(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			if n := testutil.ToFloat64(mustCollect(t, reg, tt.state)); n != 0 {
				t.Errorf("%v nodes are counted after the only one has gone", n)
			}
		})
	}
}

// mustCollect returns a collector of the gauge's series for a state.
func mustCollect(t *testing.T, reg *prometheus.Registry, state string) prometheus.Collector {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "x"})
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "criproxy_controller_nodes" && m.GetLabel()[0].GetValue() == state {
				g.Set(m.GetGauge().GetValue())
			}
		}
	}
	return g
}

// The reconciler tries a failed write again.
func TestWriteFails(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
	}}
	failure := errors.New("no such luck")
	c := fake.NewClientBuilder().WithObjects(node).WithStatusSubresource(node).WithInterceptorFuncs(interceptor.Funcs{
		SubResourcePatch: func(context.Context, client.Client, string, client.Object, client.Patch,
			...client.SubResourcePatchOption) error {
			return failure
		},
	}).Build()
	log := logrus.New()
	log.SetOutput(io.Discard)
	r := &nodecondition.Reconciler{Client: c, Nodes: &answers{said: []answer{past}}, NodePort: 1, Log: log}
	if _, err := r.Reconcile(t.Context(),
		reconcile.Request{NamespacedName: types.NamespacedName{Name: "n"}}); !errors.Is(
		err, failure) {
		t.Errorf("error %v", err)
	}
}
