// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	// Registers gzip, so that a peer that compresses is understood instead of
	// being told Unimplemented in the other peer's name.
	_ "google.golang.org/grpc/encoding/gzip"
)

const (
	// streamWindow and connWindow are what the proxy lets a peer send ahead of its reading. A list
	// of a thousand containers crosses without waiting for window updates; for a larger message
	// gRPC opens the window as soon as it has read its length. A stream that nobody reads leaves as
	// much in memory. They are static because gRPC's estimator starts at 64 KiB and would wait.
	streamWindow = 2 << 20
	connWindow   = 16 << 20

	// maxHeaderList is far above the peers' own limits (16 MiB by default), so
	// that theirs decide.
	maxHeaderList = 64 << 20

	// authority is what kubelet sends over a Unix socket, and gRPC's default for one.
	authority = "localhost"
)

// UpstreamOptions are the settings of [NewUpstream].
type UpstreamOptions struct {
	// Log gets one line for each change of the connection's state. Nil: no logging.
	Log logrus.FieldLogger
}

// Upstream is the connection to the container runtime. One connection carries
// the proxied calls and the typed calls of the node's own operations.
type Upstream struct {
	endpoint string
	conn     *grpc.ClientConn
	log      logrus.FieldLogger

	cancel context.CancelFunc
	owned  sync.WaitGroup // the goroutines that end with Close
}

// NewUpstream prepares the connection to the runtime at endpoint, a path or a
// unix:// URL. It connects in the background and keeps trying: a runtime that is
// away is no error here, and calls answer Unavailable until it is back.
func NewUpstream(endpoint string, o UpstreamOptions) (*Upstream, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = discardLogger()
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithAuthority(authority),
		// Nothing but the caller may repeat a call: a CreateContainer sent twice
		// is two containers. It also saves the replay buffer.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		// An idle channel would have to connect first for the next call.
		grpc.WithIdleTimeout(0),
		// gRPC's own limit of 120 s would leave the node without a runtime for
		// two minutes after an outage; kubelet itself tries every 3 s. The first
		// try after a restart of the runtime must come well within one second,
		// and a failed dial of a Unix socket costs next to nothing.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  20 * time.Millisecond,
				Multiplier: 1.5,
				Jitter:     0.2,
				MaxDelay:   200 * time.Millisecond,
			},
			// As kubelet's: a runtime that accepts but does not answer.
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithMaxHeaderListSize(maxHeaderList),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(math.MaxInt32),
			grpc.MaxCallSendMsgSize(math.MaxInt32),
		),
	)
	if err != nil {
		return nil, fmt.Errorf("runtime endpoint %q: %w", endpoint, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	u := &Upstream{
		endpoint: "unix://" + path,
		conn:     conn,
		log:      o.Log.WithField("endpoint", "unix://"+path),
		cancel:   cancel,
	}
	u.owned.Go(func() { u.keepConnecting(ctx) })
	u.owned.Go(func() { u.watchSocket(ctx, path) })
	return u, nil
}

// socketPath accepts what kubelet accepts as an endpoint on Linux.
func socketPath(endpoint string) (string, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if path == endpoint {
		path = strings.TrimPrefix(endpoint, "unix:")
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("runtime endpoint %q: want unix:///path/to.sock or an absolute path", endpoint)
	}
	return filepath.Clean(path), nil
}

// Conn returns the connection. Ordinary generated clients work on it.
func (u *Upstream) Conn() *grpc.ClientConn { return u.conn }

// State returns the state of the connection. Ready means that the runtime
// completed the HTTP/2 handshake, not that it answers.
func (u *Upstream) State() connectivity.State { return u.conn.GetState() }

// Endpoint returns the runtime's endpoint as a unix:// URL.
func (u *Upstream) Endpoint() string { return u.endpoint }

// Close ends the connection and every call on it.
func (u *Upstream) Close() error {
	u.cancel()
	err := u.conn.Close()
	u.owned.Wait()
	return err
}

// keepConnecting leaves the channel no idle moment: gRPC itself reconnects only
// when the next call comes, which would then wait for it.
func (u *Upstream) keepConnecting(ctx context.Context) {
	up := false
	for {
		state := u.conn.GetState()
		switch state {
		case connectivity.Idle:
			u.conn.Connect()
		case connectivity.Ready:
			up = true
			u.log.Info("runtime connected")
		case connectivity.TransientFailure:
			if up {
				up = false
				u.log.Warn("runtime is away, calls answer Unavailable until it is back")
			}
		case connectivity.Shutdown:
			return
		}
		if !u.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

func discardLogger() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.PanicLevel)
	return l
}
