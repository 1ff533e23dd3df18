// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"context"
	"crypto/rand"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// RestartOptions are the flags of `cri-proxy ctl restart`.
type RestartOptions struct {
	// Containers are names.
	Containers []string
	// Grace is in whole seconds. Nil: the pod's.
	Grace    *time.Duration
	Ordered  bool
	Order    string // StopFirst or StartFirst
	MinReady time.Duration
	Force    bool
	// Expect are IDs, or NAME=ID for several containers.
	Expect      []string
	UID         string // empty: a new one
	Image       string
	RevertImage bool
	Always      bool
	AuthFile    string
	// Watch follows the operation until it ends, at most for Timeout. 0: no limit.
	Watch   bool
	Timeout time.Duration
}

// Run restarts containers of the pod NAMESPACE/POD and shows the operation.
func (o *RestartOptions) Run(ctx context.Context, c Client, p *Printer, pod string) error {
	req, err := o.request(pod)
	if err != nil {
		return err
	}
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := opsv1.NewOpsClient(conn)
	if o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.Timeout)
		defer cancel()
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	op, err := client.Restart(call, req)
	if err != nil {
		return plain(err)
	}
	if o.Watch {
		return watchTo(ctx, p.view(), &resupplying{OpsClient: client, req: req}, op.GetUid())
	}
	return p.Operation(op)
}

// request turns the command line into a request.
func (o *RestartOptions) request(pod string) (*opsv1.RestartRequest, error) {
	ref, err := parsePod(pod)
	if err != nil {
		return nil, err
	}
	if len(o.Containers) == 0 {
		return nil, usage("which container? give -c NAME, more than once for several")
	}
	if o.Grace != nil && (*o.Grace < 0 || *o.Grace%time.Second != 0) {
		return nil, usage("--grace %s: want whole seconds, 0s or more", *o.Grace)
	}
	order, err := parseOrder(o.Order, o.MinReady)
	if err != nil {
		return nil, err
	}
	if err := o.checkImage(); err != nil {
		return nil, err
	}
	req := &opsv1.RestartRequest{
		Uid:       uidOr(o.UID),
		Pod:       ref,
		Ordered:   o.Ordered,
		Force:     o.Force,
		Requester: Requester(),
	}
	for i, n := range o.Containers {
		if slices.Contains(o.Containers[:i], n) {
			return nil, usage("-c %s is given twice", n)
		}
		r := &opsv1.ContainerRestart{
			Name: n, Order: order, MinReadySeconds: int32(o.MinReady / time.Second),
			Image: o.Image, RevertImage: o.RevertImage,
		}
		if o.Always {
			r.PullPolicy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
		}
		if o.Grace != nil {
			seconds := int64(*o.Grace / time.Second)
			r.GracePeriodSeconds = &seconds
		}
		req.Containers = append(req.Containers, r)
	}
	if req.Credentials, err = credentials(o.AuthFile); err != nil {
		return nil, err
	}
	return req, o.expect(req)
}

// expect puts the expected IDs into the request.
func (o *RestartOptions) expect(req *opsv1.RestartRequest) error {
	for _, e := range o.Expect {
		container, id, named := strings.Cut(e, "=")
		if !named {
			if len(o.Containers) > 1 {
				return usage("--expect %s: with several containers write NAME=ID", e)
			}
			container, id = o.Containers[0], e
		}
		i := slices.Index(o.Containers, container)
		if i < 0 || id == "" {
			return usage("--expect %s: want NAME=ID with a NAME given as -c", e)
		}
		req.Containers[i].ExpectedContainerId = id
	}
	return nil
}

// checkImage checks the flags that are about another image.
func (o *RestartOptions) checkImage() error {
	switch {
	case o.Image != "" && o.RevertImage:
		return usage("--image and --revert-image exclude each other")
	case o.Image != "" && len(o.Containers) > 1:
		return usage("--image is for one container: give one -c")
	case o.Image == "" && !o.RevertImage && o.AuthFile != "":
		return usage("--auth-file is for --image and --revert-image")
	case o.Image == "" && !o.RevertImage && o.Always:
		return usage("--always is for --image and --revert-image")
	}
	return nil
}

// resupplying sends the credentials once more when a watch begins anew: the daemon may have been
// restarted, and keeps them in memory only.
type resupplying struct {
	opsv1.OpsClient
	req   *opsv1.RestartRequest
	again bool
}

func (s *resupplying) WatchOperation(
	ctx context.Context, r *opsv1.WatchOperationRequest, o ...grpc.CallOption,
) (operationStream, error) {
	if s.again && len(s.req.GetCredentials()) > 0 {
		if _, err := s.Restart(ctx, s.req, o...); err != nil {
			return nil, err
		}
	}
	s.again = true
	return s.OpsClient.WatchOperation(ctx, r, o...)
}

// The orders of a restart, as in custom resources.
const (
	StopFirst  = "StopFirst"
	StartFirst = "StartFirst"
)

func parseOrder(order string, minReady time.Duration) (opsv1.Order, error) {
	switch {
	case minReady < 0 || minReady%time.Second != 0 || minReady > time.Hour:
		return 0, usage("--min-ready %s: want whole seconds, at most 1h", minReady)
	case order == StartFirst:
		return opsv1.Order_ORDER_START_FIRST, nil
	case order != StopFirst:
		return 0, usage("--order %q: want StopFirst or StartFirst", order)
	case minReady != 0:
		return 0, usage("--min-ready is for --order StartFirst")
	}
	return opsv1.Order_ORDER_UNSPECIFIED, nil
}

func parsePod(pod string) (*opsv1.PodRef, error) {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, usage("%q: name the pod as NAMESPACE/POD", pod)
	}
	return &opsv1.PodRef{Namespace: namespace, Name: name}, nil
}

// credentials reads the file of --auth-file, if one is given.
func credentials(authFile string) ([]*opsv1.RegistryCredential, error) {
	if authFile == "" {
		return nil, nil
	}
	found, err := readAuthFile(authFile)
	if err != nil {
		return nil, usage("--auth-file: %w", err)
	}
	return found, nil
}

// uidOr returns the given UID, or a new one if it is empty.
func uidOr(given string) string {
	if given != "" {
		return given
	}
	// 60 bits: short enough to type, and unique among the operations of a node's last hour.
	return "ctl-" + strings.ToLower(rand.Text()[:12])
}

// Requester returns the name of the user, behind sudo too, for the daemon's audit line.
func Requester() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return "ctl/" + name
	}
	if u, err := user.Current(); err == nil {
		return "ctl/" + u.Username
	}
	return "ctl"
}
