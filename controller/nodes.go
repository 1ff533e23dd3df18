// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// OpsAddressAnnotation on a Node overrides where its cri-proxy listens for
	// commands: HOST or HOST:PORT. The certificate must still be the node's.
	OpsAddressAnnotation = "cri-proxy.io/ops-address"
	// DefaultNodePort is the TCP port of a node's command interface.
	DefaultNodePort = 10260

	// callTimeout bounds one command. The node answers from its journal, so more
	// than a few seconds means that it is not there.
	callTimeout = 5 * time.Second
	// reconnectMax is the longest pause between two dials: a node that is back is
	// found within it.
	reconnectMax = 3 * time.Second
	// idleTimeout closes the connection to a node nothing is asked of.
	idleTimeout = 5 * time.Minute
	// forgetAfter drops a connection that is not up and that nobody has used, such as that of a node that is gone.
	forgetAfter = time.Minute
)

// Node is where to reach one node's cri-proxy.
type Node struct {
	// Name of the node; its certificate must be valid for it as a DNS name.
	Name string
	// Address is HOST:PORT.
	Address string
}

// nodeOf is where cri-proxy on n is reached: the annotation, else the internal
// address, else the host name.
func nodeOf(n *corev1.Node, port int) (Node, error) {
	if override := n.Annotations[OpsAddressAnnotation]; override != "" {
		if _, _, err := net.SplitHostPort(override); err == nil {
			return Node{n.Name, override}, nil
		}
		return Node{n.Name, net.JoinHostPort(override, strconv.Itoa(port))}, nil
	}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeHostName} {
		for _, a := range n.Status.Addresses {
			if a.Type == kind && a.Address != "" {
				return Node{n.Name, net.JoinHostPort(a.Address, strconv.Itoa(port))}, nil
			}
		}
	}
	return Node{}, fmt.Errorf("node %s has neither an InternalIP nor a Hostname in its status; set its annotation %s", n.Name, OpsAddressAnnotation)
}

// NodeClient commands the nodes. All errors are *NodeError.
type NodeClient interface {
	// Restart starts an operation, or returns the one of that UID.
	Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error)
	// GetOperation returns one operation; codes.NotFound when the node has none
	// of that UID, or no longer.
	GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error)
	// ListOperations returns the node's newest operations.
	ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error)
	// CancelOperation cancels an operation that has not stopped anything;
	// codes.FailedPrecondition when it has.
	CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error)
	// WatchOperation calls each with the operation as it is and after every
	// change, and returns nil after the finished one.
	WatchOperation(ctx context.Context, n Node, uid string, each func(*opsv1.Operation)) error
}

// NodeError is a command to a node that did not work.
type NodeError struct {
	Node Node
	// Method is the RPC's name.
	Method string
	// Err carries the gRPC status.
	Err error
	// Silent says that the node gave no answer at all.
	Silent bool
}

// Error says what happened and, where the node did not answer, what to check.
func (e *NodeError) Error() string {
	message := status.Convert(e.Err).Message()
	switch {
	case e.Silent:
		return fmt.Sprintf("node %s does not answer at %s: %s (is cri-proxy running on the node, does it listen there, and does it trust this controller's certificate?)",
			e.Node.Name, e.Node.Address, message)
	case e.Code() == codes.PermissionDenied || e.Code() == codes.Unauthenticated:
		return fmt.Sprintf("node %s at %s refuses this controller: %s (is the name in the controller's certificate on the node's list of allowed clients?)",
			e.Node.Name, e.Node.Address, message)
	case e.Code() == codes.Unimplemented:
		return fmt.Sprintf("cri-proxy on node %s does not know %s: %s (upgrade it)", e.Node.Name, e.Method, message)
	}
	return message
}

// Unwrap returns the gRPC status error.
func (e *NodeError) Unwrap() error { return e.Err }

// Code is the gRPC code.
func (e *NodeError) Code() codes.Code { return status.Code(e.Err) }

// Temporary says that the same call may work later: the node or its runtime is
// away, is busy, or refuses this controller.
func (e *NodeError) Temporary() bool {
	switch e.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.ResourceExhausted,
		codes.Aborted, codes.Internal, codes.Unknown, codes.Unauthenticated, codes.PermissionDenied:
		return true
	}
	return false
}

// GRPCNodes is the NodeClient over gRPC with mutual TLS. Connections are made on
// demand, shared, and closed when idle. It is safe for concurrent use.
type GRPCNodes struct {
	credentials credentials.TransportCredentials
	metrics     *Metrics

	mu    sync.Mutex
	conns map[Node]*nodeConn
}

type nodeConn struct {
	conn *grpc.ClientConn
	used time.Time
}

var _ NodeClient = (*GRPCNodes)(nil)

// NewGRPCNodes reads the files and returns a client that has not dialled yet. [GRPCNodes.Run] must run beside its use. Its
// error says which file is missing or bad.
func NewGRPCNodes(files TLSFiles, m *Metrics, log logrus.FieldLogger) (*GRPCNodes, error) {
	c, err := files.credentials(log)
	if err != nil {
		return nil, err
	}
	return NewGRPCNodesOf(c, m), nil
}

// NewGRPCNodesOf returns a client with these credentials, which must be mutual TLS.
func NewGRPCNodesOf(c credentials.TransportCredentials, m *Metrics) *GRPCNodes {
	return &GRPCNodes{credentials: c, metrics: m, conns: map[Node]*nodeConn{}}
}

// ForgetRemoved makes the connections to a node end with its Node object: who has its certificate is nobody's node any more.
func (g *GRPCNodes) ForgetRemoved(ctx context.Context, c cache.Cache) error {
	informer, err := c.GetInformer(ctx, &corev1.Node{})
	if err != nil {
		return err
	}
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{UpdateFunc: func(before, after any) {
		a, ok1 := before.(*corev1.Node)
		b, ok2 := after.(*corev1.Node)
		if ok1 && ok2 && a.UID != b.UID { // deleted and made again while the watch was away
			g.Forget(func(other Node) bool { return other.Name == a.Name })
		}
	}, DeleteFunc: func(o any) {
		if gone, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if n, ok := o.(*corev1.Node); ok {
			g.Forget(func(other Node) bool { return other.Name == n.Name })
		}
	}})
	return err
}

// Forget closes the connections to some nodes, for example when nothing that they were made with counts any more.
func (g *GRPCNodes) Forget(some func(Node) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for n, c := range g.conns {
		if some(n) {
			_ = c.conn.Close() // who waits for an answer asks again
			delete(g.conns, n)
		}
	}
}

// Close closes all connections.
func (g *GRPCNodes) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for n, c := range g.conns {
		errs = append(errs, c.conn.Close())
		delete(g.conns, n)
	}
	return errors.Join(errs...)
}

// client is the node's stub. A node whose address changed gets a connection of
// its own; the old one is closed once nobody has used it for forgetAfter.
func (g *GRPCNodes) client(n Node) (opsv1.OpsClient, *grpc.ClientConn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if c := g.conns[n]; c != nil {
		c.used = now
		return opsv1.NewOpsClient(c.conn), c.conn, nil
	}
	conn, err := g.dial(n)
	if err != nil {
		return nil, nil, err
	}
	g.conns[n] = &nodeConn{conn, now}
	return opsv1.NewOpsClient(conn), conn, nil
}

// dial makes a connection, which is made up with its first call.
func (g *GRPCNodes) dial(n Node) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+n.Address,
		grpc.WithTransportCredentials(g.credentials),
		grpc.WithAuthority(n.Name),
		grpc.WithIdleTimeout(idleTimeout),
		// Commands are small, and there may be thousands of nodes.
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax},
			MinConnectTimeout: callTimeout,
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithUserAgent("cri-controller"),
		grpc.WithStatsHandler(endings{}),
	)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "address %q: %v", n.Address, err)
	}
	return conn, nil
}

// Run forgets nodes that are not talked to any more, until ctx ends.
func (g *GRPCNodes) Run(ctx context.Context) error {
	for tick := time.NewTicker(forgetAfter); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return nil
		case now := <-tick.C:
			g.sweep(now)
		}
	}
}

// sweep drops connections that are down and unused. One with a stream on it is up.
func (g *GRPCNodes) sweep(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for n, c := range g.conns {
		if now.Sub(c.used) > forgetAfter && c.conn.GetState() != connectivity.Ready {
			_ = c.conn.Close() // nothing is in flight on an idle connection
			delete(g.conns, n)
		}
	}
}

// call runs one unary command of the Ops service within callTimeout.
func call[T any](ctx context.Context, g *GRPCNodes, n Node, method string, do func(context.Context, opsv1.OpsClient) (T, error)) (T, error) {
	return callOn(ctx, g, n, method, func(ctx context.Context, conn *grpc.ClientConn) (T, error) {
		return do(ctx, opsv1.NewOpsClient(conn))
	})
}

// callOn runs one unary command within callTimeout.
func callOn[T any](ctx context.Context, g *GRPCNodes, n Node, method string, do func(context.Context, *grpc.ClientConn) (T, error)) (T, error) {
	var none T
	_, conn, err := g.client(n)
	if err != nil {
		return none, &NodeError{Node: n, Method: method, Err: err, Silent: true}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ctx, end := noteEnding(ctx)
	start := time.Now()
	answer, err := do(ctx, conn)
	g.metrics.nodeCall(method, status.Code(err), time.Since(start))
	if err != nil {
		return none, &NodeError{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return answer, nil
}

// Restart implements NodeClient.
func (g *GRPCNodes) Restart(ctx context.Context, n Node, r *opsv1.RestartRequest) (*opsv1.Operation, error) {
	return call(ctx, g, n, "Restart", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.Restart(ctx, r)
	})
}

// GetOperation implements NodeClient.
func (g *GRPCNodes) GetOperation(ctx context.Context, n Node, uid string) (*opsv1.Operation, error) {
	return call(ctx, g, n, "GetOperation", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: uid})
	})
}

// ListOperations implements NodeClient.
func (g *GRPCNodes) ListOperations(ctx context.Context, n Node) ([]*opsv1.Operation, error) {
	return call(ctx, g, n, "ListOperations", func(ctx context.Context, c opsv1.OpsClient) ([]*opsv1.Operation, error) {
		answer, err := c.ListOperations(ctx, &opsv1.ListOperationsRequest{})
		return answer.GetOperations(), err
	})
}

// CancelOperation implements NodeClient.
func (g *GRPCNodes) CancelOperation(ctx context.Context, n Node, uid, reason string) (*opsv1.Operation, error) {
	return call(ctx, g, n, "CancelOperation", func(ctx context.Context, c opsv1.OpsClient) (*opsv1.Operation, error) {
		return c.CancelOperation(ctx, &opsv1.CancelOperationRequest{Uid: uid, Reason: reason})
	})
}

// WatchOperation implements NodeClient.
func (g *GRPCNodes) WatchOperation(ctx context.Context, n Node, uid string, each func(*opsv1.Operation)) error {
	const method = "WatchOperation"
	client, _, err := g.client(n)
	if err != nil {
		return &NodeError{Node: n, Method: method, Err: err, Silent: true}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, end := noteEnding(ctx)
	stream, err := client.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: uid})
	for err == nil {
		var op *opsv1.Operation
		if op, err = stream.Recv(); err == nil {
			each(op)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	g.metrics.nodeCall(method, status.Code(err), 0)
	if err != nil {
		return &NodeError{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return nil
}
