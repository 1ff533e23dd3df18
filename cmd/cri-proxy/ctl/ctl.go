// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/config"
)

const (
	// socketVariable is the environment variable that names the admin socket.
	socketVariable = "CRI_PROXY_ADMIN_SOCKET"
	// callTimeout bounds one command. The slowest waits for the runtime to answer
	// some lists, and for cancel to take back what it staged.
	callTimeout = 30 * time.Second
)

// ctl is what the commands share.
type ctl struct {
	socket string
	output format
	// now is the clock for ages.
	now func() time.Time
}

// Command returns `cri-proxy ctl`. now is the clock, for ages.
func Command(now func() time.Time) *cobra.Command {
	c := &ctl{output: table, now: now}
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Command the node daemon over its admin socket",
	}
	socket := os.Getenv(socketVariable)
	if socket == "" {
		socket = config.DefaultAdminSocket
	}
	cmd.PersistentFlags().StringVar(&c.socket, "admin-socket", socket, "admin socket of the daemon, also $"+socketVariable)
	cmd.PersistentFlags().VarP(&c.output, "output", "o", "json, yaml, table or wide")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats(), cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(c.restart(), c.overrides(), c.upgrade(), c.ops(), c.cancel(), c.pull(), c.pulls(), c.images(), c.unpin(), c.status(), c.doctor(), c.profile(), c.version())
	return cmd
}

// dial returns a client of the daemon's commands for containers.
func (c *ctl) dial(ctx context.Context) (opsv1.OpsClient, func(), error) {
	conn, closeConn, err := c.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	return opsv1.NewOpsClient(conn), closeConn, nil
}

// dialImages returns a client of the daemon's commands for images.
func (c *ctl) dialImages(ctx context.Context) (opsv1.ImagesClient, func(), error) {
	conn, closeConn, err := c.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	return opsv1.NewImagesClient(conn), closeConn, nil
}

// connect returns a connection to the daemon. That nobody is there is found out at once,
// with what to do about it.
func (c *ctl) connect(ctx context.Context) (*grpc.ClientConn, func(), error) {
	var d net.Dialer
	probe, err := d.DialContext(ctx, "unix", c.socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, fmt.Errorf("no cri-proxy at %s: the socket does not exist; start the daemon (systemctl start cri-proxy.socket) or name its socket with --admin-socket or $%s", c.socket, socketVariable)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, nil, fmt.Errorf("no cri-proxy at %s: the daemon behind the socket is gone; start it (systemctl start cri-proxy@a), see also journalctl -u 'cri-proxy@*'", c.socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, nil, fmt.Errorf("%s is for root only: run this with sudo", c.socket)
	case err != nil:
		return nil, nil, fmt.Errorf("no cri-proxy at %s: %w", c.socket, err)
	}
	_ = probe.Close()
	conn, err := grpc.NewClient("passthrough:///"+c.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)
	if err != nil {
		return nil, nil, fmt.Errorf("admin socket %s: %w", c.socket, err)
	}
	return conn, func() { _ = conn.Close() }, nil
}

// interruptible returns a context that ends with SIGINT or SIGTERM too.
func interruptible(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
}

// plain makes a gRPC error readable: the daemon's message already says everything.
func plain(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return &callError{status: s}
	}
	return err
}

// callError is the daemon's refusal. It keeps its gRPC status.
type callError struct{ status *status.Status }

func (e *callError) Error() string {
	if e.status.Message() == context.DeadlineExceeded.Error() {
		return "the daemon did not answer in time; see journalctl -u 'cri-proxy@*'"
	}
	return e.status.Message()
}

// GRPCStatus returns the status that the daemon answered.
func (e *callError) GRPCStatus() *status.Status { return e.status }

// usage is an error of the command line itself.
func usage(format string, args ...any) error {
	return &config.InvalidError{Err: fmt.Errorf(format, args...)}
}
