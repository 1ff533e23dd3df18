// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
)

const (
	// SocketVariable is the environment variable that names the admin socket.
	SocketVariable = "CRI_PROXY_ADMIN_SOCKET"
	// callTimeout bounds one call. The slowest calls wait until the runtime has listed its
	// containers, or until a cancel has removed the staged container.
	callTimeout = 30 * time.Second
	// maxAnswer is above the longest list of a node.
	maxAnswer = 64 << 20
)

// Client calls the daemon of this machine.
type Client struct {
	// Socket is the path of the admin socket.
	Socket string
}

// Ops calls f with a client of the commands for containers, and bounds the time of its calls.
// If f returns the error of a call, Ops returns the daemon's words.
func (c Client) Ops(ctx context.Context, f func(context.Context, opsv1.OpsClient) error) error {
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		return f(ctx, opsv1.NewOpsClient(conn))
	})
}

// Images is [Client.Ops] for the commands for images.
func (c Client) Images(ctx context.Context, f func(context.Context, opsv1.ImagesClient) error) error {
	return c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		return f(ctx, opsv1.NewImagesClient(conn))
	})
}

func (c Client) call(ctx context.Context, f func(context.Context, *grpc.ClientConn) error) error {
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return plain(f(ctx, conn))
}

// connect returns a connection to the daemon. If nobody listens, connect says so at once, and what
// to do about it.
func (c Client) connect(ctx context.Context) (*grpc.ClientConn, error) {
	var d net.Dialer
	probe, err := d.DialContext(ctx, "unix", c.Socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no cri-proxy at %s: the socket does not exist; start the daemon "+
			"(systemctl start cri-proxy.socket) or name its socket with "+
			"--admin-socket or $%s", c.Socket, SocketVariable)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("no cri-proxy at %s: the daemon behind the socket is gone; start it "+
			"(systemctl start cri-proxy@a), see also journalctl -u 'cri-proxy@*'", c.Socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s is for root only: run this with sudo", c.Socket)
	case err != nil:
		return nil, fmt.Errorf("no cri-proxy at %s: %w", c.Socket, err)
	}
	_ = probe.Close()
	conn, err := grpc.NewClient("passthrough:///"+c.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
	)
	if err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", c.Socket, err)
	}
	return conn, nil
}

// plain makes a gRPC error readable: the daemon's message says everything.
func plain(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return &callError{status: s}
	}
	return err
}

// callError is an error that the daemon has answered. It keeps the gRPC status.
type callError struct{ status *status.Status }

func (e *callError) Error() string {
	if e.status.Message() == context.DeadlineExceeded.Error() {
		return "the daemon did not answer in time; see journalctl -u 'cri-proxy@*'"
	}
	return e.status.Message()
}

// GRPCStatus returns the status that the daemon has answered.
func (e *callError) GRPCStatus() *status.Status { return e.status }

// usage is an error of the command line itself.
func usage(format string, args ...any) error {
	return &config.InvalidError{Err: fmt.Errorf(format, args...)}
}
