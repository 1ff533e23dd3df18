// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"context"
	"errors"
	"io"
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
)

const (
	// callTimeout bounds one command. The node answers from its journal, so a node that takes more
	// than a few seconds is away.
	callTimeout = 5 * time.Second
	// reconnectMax is the longest pause between two dials: the client finds a node that is back
	// within this time.
	reconnectMax = 3 * time.Second
	// idleTimeout closes the connection to a node that nobody asks anything.
	idleTimeout = 5 * time.Minute
	// forgetAfter drops a connection that is down and that nobody has used for this long, such as
	// the connection to a node that is gone.
	forgetAfter = time.Minute
)

// Client calls nodes over gRPC with mutual TLS. It makes connections on demand, shares them, and
// closes them when idle. It is safe for concurrent use. All errors of its calls are [*Error].
type Client struct {
	credentials credentials.TransportCredentials
	metrics     *Metrics

	mu    sync.Mutex
	conns map[Node]*connection
}

type connection struct {
	conn *grpc.ClientConn
	used time.Time
}

var _ Operations = (*Client)(nil)

// New reads the files and returns a client that has not dialled yet. [Client.Run] must run beside
// its use. The error says which file is missing or bad.
func New(files Files, m *Metrics, log logrus.FieldLogger) (*Client, error) {
	creds, err := files.credentials(log)
	if err != nil {
		return nil, err
	}
	return NewWithCredentials(creds, m), nil
}

// NewWithCredentials returns a client with these credentials, which must be mutual TLS.
func NewWithCredentials(creds credentials.TransportCredentials, m *Metrics) *Client {
	return &Client{credentials: creds, metrics: m, conns: map[Node]*connection{}}
}

// ForgetRemoved closes the connections to a node when its Node object goes: whoever holds the
// node's certificate then speaks for no node any more.
func (c *Client) ForgetRemoved(ctx context.Context, objects cache.Cache) error {
	informer, err := objects.GetInformer(ctx, &corev1.Node{})
	if err != nil {
		return err
	}
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{UpdateFunc: func(before, after any) {
		a, ok1 := before.(*corev1.Node)
		b, ok2 := after.(*corev1.Node)
		if ok1 && ok2 && a.UID != b.UID { // deleted and created again while the watch was away
			c.Forget(func(other Node) bool { return other.Name == a.Name })
		}
	}, DeleteFunc: func(o any) {
		if gone, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if n, ok := o.(*corev1.Node); ok {
			c.Forget(func(other Node) bool { return other.Name == n.Name })
		}
	}})
	return err
}

// Forget closes the connections to the nodes for which match returns true, for example when the
// credentials that the connections were made with are no longer valid.
func (c *Client) Forget(match func(Node) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, known := range c.conns {
		if match(n) {
			_ = known.conn.Close() // a caller that waits for an answer asks again
			delete(c.conns, n)
		}
	}
}

// Close closes all connections.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for n, known := range c.conns {
		errs = append(errs, known.conn.Close())
		delete(c.conns, n)
	}
	return errors.Join(errs...)
}

// shared returns the connection to the node. A node whose address changed gets a connection of its
// own; sweep closes the old one once nobody has used it for forgetAfter.
func (c *Client) shared(n Node) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if known := c.conns[n]; known != nil {
		known.used = now
		return known.conn, nil
	}
	conn, err := c.dial(n)
	if err != nil {
		return nil, err
	}
	c.conns[n] = &connection{conn, now}
	return conn, nil
}

// single returns the shared connection to the node if there is one, else a connection for a single
// call. The caller calls done after it.
func (c *Client) single(n Node) (conn *grpc.ClientConn, done func(), err error) {
	c.mu.Lock()
	known := c.conns[n]
	c.mu.Unlock()
	if known != nil {
		return known.conn, func() {}, nil
	}
	if conn, err = c.dial(n); err != nil {
		return nil, nil, err
	}
	return conn, func() { _ = conn.Close() }, nil
}

// dial makes a connection. The first call on the connection connects it.
func (c *Client) dial(n Node) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+n.Address,
		grpc.WithTransportCredentials(c.credentials),
		grpc.WithAuthority(n.Name),
		grpc.WithIdleTimeout(idleTimeout),
		// Commands are small, and there may be thousands of nodes.
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax,
			},
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

// Run drops the connections to nodes that nobody talks to any more, until ctx ends. It returns nil.
func (c *Client) Run(ctx context.Context) error {
	for tick := time.NewTicker(forgetAfter); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return nil
		case now := <-tick.C:
			c.sweep(now)
		}
	}
}

// sweep drops connections that are down and unused. A connection with a stream on it is up.
func (c *Client) sweep(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, known := range c.conns {
		if now.Sub(known.used) > forgetAfter && known.conn.GetState() != connectivity.Ready {
			_ = known.conn.Close() // nothing is in flight on an idle connection
			delete(c.conns, n)
		}
	}
}

// unary runs one unary command within callTimeout, on a connection that it got from connect.
func unary[T any](
	ctx context.Context, c *Client, n Node, method string, conn *grpc.ClientConn,
	do func(context.Context, *grpc.ClientConn) (T, error),
) (T, error) {
	var none T
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ctx, end := noteEnding(ctx)
	start := time.Now()
	answer, err := do(ctx, conn)
	c.metrics.called(method, status.Code(err), time.Since(start))
	if err != nil {
		return none, &Error{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return answer, nil
}

// call runs one unary command within callTimeout, on the shared connection.
func call[T any](
	ctx context.Context, c *Client, n Node, method string, do func(context.Context, *grpc.ClientConn) (T, error),
) (T, error) {
	conn, err := c.shared(n)
	if err != nil {
		var none T
		return none, &Error{Node: n, Method: method, Err: err, Silent: true}
	}
	return unary(ctx, c, n, method, conn, do)
}

// follow calls each with what a stream of the node brings, until each returns false or the node
// ends the stream, and returns nil then.
func follow[T any](
	ctx context.Context, c *Client, n Node, method string,
	open func(context.Context, *grpc.ClientConn) (grpc.ServerStreamingClient[T], error), each func(*T) bool,
) error {
	conn, err := c.shared(n)
	if err != nil {
		return &Error{Node: n, Method: method, Err: err, Silent: true}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ctx, end := noteEnding(ctx)
	stream, err := open(ctx, conn)
	for err == nil {
		var next *T
		if next, err = stream.Recv(); err == nil && !each(next) {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	c.metrics.called(method, status.Code(err), 0)
	if err != nil {
		return &Error{Node: n, Method: method, Err: err, Silent: end.silent(err)}
	}
	return nil
}
