// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package podsapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	// DefaultSocket is where kubelet serves the API (pkg/kubelet/kubelet_getters.go getPodsAPIDir).
	DefaultSocket = "/var/lib/kubelet/pods-api/pods-api.sock"

	// getPod is a method of service Pods (k8s.io/kubelet/pkg/apis/pods/v1alpha1/api.proto). Its
	// request and its response have one field each, a string and bytes with number 1: on the wire
	// they are a StringValue and a BytesValue.
	getPod = "/v1alpha1.Pods/GetPod"

	// timeout bounds a call: kubelet answers from memory, and calls of its own wait for ours.
	timeout = 500 * time.Millisecond
)

var (
	// ErrNotFound means that kubelet has no pod with that UID (any more).
	ErrNotFound = errors.New("kubelet has no such pod")
	// ErrUnavailable means that kubelet does not tell: it is older than 1.37, has the API switched
	// off, is just starting, or does not answer in time.
	ErrUnavailable = errors.New("kubelet's Pods API does not answer")
)

// Client asks kubelet. It holds no connection: calls are few, and kubelet comes and goes.
type Client struct {
	socket  string
	timeout time.Duration // of a call; [timeout], but for tests on a machine with too much to do
}

var _ Pods = (*Client)(nil)

// New returns a client of the API at that unix socket. Nothing need be there.
func New(socket string) *Client { return &Client{socket: socket, timeout: timeout} }

// Pod returns the pod with that UID as kubelet sees it now, which may be ahead of the API server.
//
// Errors: [ErrNotFound], [ErrUnavailable], ctx's, or that the answer makes no sense.
func (c *Client) Pod(ctx context.Context, uid string) (*Pod, error) {
	call, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+c.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}),
		grpc.WithAuthority("localhost"),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, fmt.Errorf("kubelet's Pods API: %w", err)
	}
	defer conn.Close()
	answer := &wrapperspb.BytesValue{}
	err = conn.Invoke(call, getPod, wrapperspb.String(uid), answer)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case status.Code(err) == codes.NotFound:
		return nil, ErrNotFound
	default:
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, status.Convert(err).Message())
	}
	pod, err := decodePod(answer.GetValue())
	if err != nil {
		return nil, fmt.Errorf("kubelet's answer about pod %s is not a pod: %w", uid, err)
	}
	if pod.UID != uid {
		return nil, fmt.Errorf("kubelet was asked for pod %s and answered about %q", uid, pod.UID)
	}
	return pod, nil
}
