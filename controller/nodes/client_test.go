// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache/informertest"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/test/address"
	"github.com/cri-proxy/cri-proxy/test/fleet"
)

func TestOf(t *testing.T) {
	address := func(kind corev1.NodeAddressType, a string) corev1.NodeAddress {
		return corev1.NodeAddress{Type: kind, Address: a}
	}
	tests := []struct {
		name       string
		annotation string
		addresses  []corev1.NodeAddress
		want       string
	}{
		{"internal address first", "",
			[]corev1.NodeAddress{address(corev1.NodeHostName, "h"), address(corev1.NodeExternalIP, "1.1.1.1"),
				address(corev1.NodeInternalIP, "10.0.0.1")}, "10.0.0.1:10260"},
		{"else the host name", "", []corev1.NodeAddress{address(corev1.NodeHostName, "h")}, "h:10260"},
		{"IPv6", "", []corev1.NodeAddress{address(corev1.NodeInternalIP, "fd00::1")}, "[fd00::1]:10260"},
		{"annotation with a port", "10.9.9.9:1234", []corev1.NodeAddress{address(corev1.NodeInternalIP, "10.0.0.1")},
			"10.9.9.9:1234"},
		{"annotation without", "10.9.9.9", nil, "10.9.9.9:10260"},
		{"annotation with IPv6", "fd00::2", nil, "[fd00::2]:10260"},
		{"nothing", "", nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"},
				Status: corev1.NodeStatus{Addresses: tt.addresses}}
			if tt.annotation != "" {
				n.Annotations = map[string]string{nodes.AddressAnnotation: tt.annotation}
			}
			got, err := nodes.Of(n, nodes.DefaultPort)
			if got.Address != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %v, error %v; want %s", got, err, tt.want)
			}
		})
	}
}

// patience is how long a test waits for what must happen.
const patience = time.Minute

const podUID = "pod-uid"

func newClient(t *testing.T, files nodes.Files) *nodes.Client {
	t.Helper()
	c, err := nodes.New(files, nil, logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestNodeTLS(t *testing.T) {
	ca := fleet.NewCA(t)
	node := fleet.Serve(t, ca.Issue("node-1"))
	files := ca.Issue("cri-controller")
	get := func(c *nodes.Client, name string) error {
		_, err := c.GetOperation(context.Background(), nodes.Node{name, node.Address}, "x")
		return err
	}
	t.Run("a node's answer", func(t *testing.T) {
		err := get(newClient(t, files), "node-1")
		if nodes.Code(err) != codes.NotFound || err.Error() != "no such operation" {
			t.Errorf("error %v", err)
		}
	})
	t.Run("another node's certificate", func(t *testing.T) {
		err := get(newClient(t, files), "node-2")
		if err == nil || !strings.Contains(err.Error(), "valid for node-1, not node-2") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a CA the node does not trust", func(t *testing.T) {
		foreign := fleet.NewCA(t).Issue("cri-controller")
		foreign.CA = files.CA
		err := get(newClient(t, foreign), "node-1")
		var nodeError *nodes.Error
		if !errors.As(err, &nodeError) || !nodeError.Temporary() ||
			!strings.Contains(err.Error(), "trust this controller's certificate") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("renewed in place", func(t *testing.T) {
		other := fleet.NewCA(t)
		second := fleet.Serve(t, other.Issue("node-3"))
		c := newClient(t, files)
		_, err := c.GetOperation(context.Background(), nodes.Node{"node-3", second.Address}, "x")
		if nodes.Code(err) != codes.Unavailable {
			t.Fatalf("error %v, want the node of another CA refused", err)
		}
		renewed := other.Issue("cri-controller")
		for from, to := range map[string]string{renewed.Cert: files.Cert, renewed.Key: files.Key,
			renewed.CA: files.CA} {
			text, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for end := time.Now().Add(patience); ; { // the next dial, after its back-off
			_, err := c.GetOperation(context.Background(), nodes.Node{"node-3", second.Address}, "x")
			if nodes.Code(err) == codes.NotFound {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("error %v", err)
			}
		}
	})
}

func TestBadTLSFiles(t *testing.T) {
	ca := fleet.NewCA(t)
	good := ca.Issue("c")
	tests := []struct {
		name  string
		files nodes.Files
		want  string
	}{
		{"none", nodes.Files{}, "must all be given"},
		{"no such file", nodes.Files{good.Cert, good.Key, "/nonexistent"}, "/nonexistent"},
		{"key of another", nodes.Files{good.Cert, ca.Issue("d").Key, good.CA}, "certificate " + good.Cert},
		{"CA without a certificate", nodes.Files{good.Cert, good.Key, good.Key}, "holds no PEM certificate"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := nodes.New(tt.files, nil, logrus.New())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func TestSilentNode(t *testing.T) {
	ca := fleet.NewCA(t)
	c := newClient(t, ca.Issue("cri-controller"))
	t.Run("nobody listens", func(t *testing.T) {
		_, err := c.GetOperation(context.Background(), nodes.Node{"n", address.Reserve(t)}, "x")
		var nodeError *nodes.Error
		if !errors.As(err, &nodeError) || !nodeError.Silent || !nodeError.Temporary() ||
			!strings.Contains(err.Error(), "connection refused") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("accepts and says nothing", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		_, err = c.GetOperation(ctx, nodes.Node{"n", l.Addr().String()}, "x")
		var nodeError *nodes.Error
		if !errors.As(err, &nodeError) || !nodeError.Silent {
			t.Errorf("error %v", err)
		}
	})
}

// TestSilence: a node that goes away in the middle of a call has given no answer, one whose runtime
// is away has, also at the end of a stream.
func TestSilence(t *testing.T) {
	ca := fleet.NewCA(t)
	files := ca.Issue("node-1")
	c := newClient(t, ca.Issue("cri-controller"))
	silent := func(err error) bool {
		t.Helper()
		var e *nodes.Error
		if !errors.As(err, &e) || e.Code() != codes.Unavailable {
			t.Errorf("error %v", err)
		}
		return e != nil && e.Silent
	}
	begin := func() (*fleet.Node, nodes.Node) {
		n := fleet.Serve(t, files)
		n.Run(podUID, "app", "old", 0)
		t.Cleanup(n.Hold("app", opsv1.Phase_PHASE_STAGING))
		at := nodes.Node{"node-1", n.Address}
		if _, err := c.Restart(t.Context(), at, &opsv1.RestartRequest{Uid: "x", Pod: &opsv1.PodRef{Uid: podUID},
			Containers: []*opsv1.ContainerRestart{{Name: "app"}}, Force: true}); err != nil {
			t.Fatal(err)
		}
		return n, at
	}
	for range 20 { // the call ends before the connection is known to be gone, or after it
		n, at := begin()
		heard, ended := make(chan struct{}, 10), make(chan error, 1)
		go func() {
			ended <- c.WatchOperation(t.Context(), at, "x", func(*opsv1.Operation) { heard <- struct{}{} })
		}()
		<-heard
		n.Down()
		if !silent(<-ended) {
			t.Error("a node that has gone away has answered")
		}
	}
	n, at := begin()
	n.Refuse(status.Error(codes.Unavailable, "the runtime is away"))
	if _, err := c.Restart(t.Context(), at, &opsv1.RestartRequest{Uid: "y", Pod: &opsv1.PodRef{Uid: podUID},
		Containers: []*opsv1.ContainerRestart{{Name: "app"}}}); silent(err) {
		t.Error("a node that has answered is silent")
	}
}

func TestErrorText(t *testing.T) {
	n := nodes.Node{"n", "10.0.0.1:10260"}
	tests := []struct {
		code      codes.Code
		want      string
		temporary bool
	}{
		{codes.PermissionDenied, "on the node's list of allowed clients?", true},
		{codes.Unimplemented, "upgrade it", false},
		{codes.FailedPrecondition, "why", false},
		{codes.NotFound, "why", false},
		{codes.InvalidArgument, "why", false},
		{codes.ResourceExhausted, "why", true},
		{codes.Unavailable, "why", true},
	}
	for _, tt := range tests {
		t.Run(tt.code.String(), func(t *testing.T) {
			err := &nodes.Error{Node: n, Method: "Restart", Err: status.Error(tt.code, "why")}
			if !strings.Contains(err.Error(), tt.want) || err.Temporary() != tt.temporary {
				t.Errorf("%q, temporary %v", err.Error(), err.Temporary())
			}
		})
	}
}

// Nodes that go away leave nothing behind: no connection, no goroutine.
func TestNodesGone(t *testing.T) {
	ca := fleet.NewCA(t)
	c := newClient(t, ca.Issue("cri-controller"))
	before := runtime.NumGoroutine()
	var ends []func()
	for i := range 30 {
		name := fmt.Sprintf("node-%d", i)
		n := fleet.Serve(t, ca.Issue(name))
		if _, err := c.GetOperation(t.Context(), nodes.Node{name, n.Address}, "x"); nodes.Code(err) != codes.NotFound {
			t.Fatalf("error %v", err)
		}
		ends = append(ends, func() { n.Down() })
	}
	c.Sweep(time.Now().Add(2 * time.Minute))
	if len(c.Connected()) != 30 {
		t.Errorf("%d connections of 30 nodes are kept", len(c.Connected()))
	}
	for _, end := range ends {
		end()
	}
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c.Sweep(time.Now().Add(2 * time.Minute))
		now := runtime.NumGoroutine()
		if len(c.Connected()) == 0 && now <= before+5 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d connections are left, and %d goroutines, %d before", len(c.Connected()), now, before)
		}
	}
}

// A node that is removed from the cluster is not talked to any more, over connections that are open
// neither.
func TestRemovedNode(t *testing.T) {
	ca := fleet.NewCA(t)
	c := newClient(t, ca.Issue("cri-controller"))
	types, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	informers := &informertest.FakeInformers{Scheme: types}
	if err := c.ForgetRemoved(t.Context(), informers); err != nil {
		t.Fatal(err)
	}
	informer, err := informers.FakeInformerFor(t.Context(), &corev1.Node{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"node-1", "node-2"} {
		n := fleet.Serve(t, ca.Issue(name))
		if _, err := c.GetOperation(t.Context(), nodes.Node{name, n.Address}, "x"); nodes.Code(err) != codes.NotFound {
			t.Fatalf("error %v", err)
		}
	}
	informer.Delete(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}})
	if len(c.Connected()) != 1 {
		t.Fatalf("%d connections", len(c.Connected()))
	}
	for _, n := range c.Connected() {
		if n.Name != "node-2" {
			t.Errorf("connected to %v", n)
		}
	}
}
