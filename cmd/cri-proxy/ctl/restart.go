// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"crypto/rand"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// restartFlags are the flags of `ctl restart`.
type restartFlags struct {
	containers []string
	grace      time.Duration
	ordered    bool
	order      string
	minReady   time.Duration
	force      bool
	expect     []string
	uid        string
	watch      bool
	timeout    time.Duration
	image      string
	revert     bool
	always     bool
	authFile   string
}

func (c *ctl) restart() *cobra.Command {
	var f restartFlags
	cmd := &cobra.Command{
		Use:   "restart NAMESPACE/POD -c NAME [-c NAME...]",
		Short: "Restart containers of a pod in place",
		Long: `Restart containers of a pod in place: a fresh container in the same pod, same IP
and volumes, whatever the pod's restartPolicy says, without back-off.

The pod's preStop hooks run. postStart hooks do not: this node knows them only from
a ContainerRecreateRequest. Nor does it know what ConfigMaps, Secrets, annotations and
Services say by now: the variables are those of the container's last start. A
ContainerRecreateRequest takes up the new ones.

With --image the new container has another image than the pod's spec says, and keeps
it when kubelet makes the container anew, until --revert-image, or until the spec gets
another image: for trying one out on a running pod. The pod's status shows it; the
API server is not asked. See cri-proxy ctl overrides. Credentials of the auth file go
to the daemon, which keeps them in memory only.

Without --watch the command returns once the daemon has written the operation
down; it then runs to its end whatever happens. With --watch the exit code is 1
if it did not succeed.`,
		Example: `  cri-proxy ctl restart default/web -c app --watch
  cri-proxy ctl restart default/web -c app -c sidecar --ordered --grace 10s
  cri-proxy ctl restart default/web -c app --image registry.example/app:debug --watch
  cri-proxy ctl restart default/web -c app --revert-image`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one pod: cri-proxy ctl restart NAMESPACE/POD -c NAME")
			}
			return nil
		},
		ValidArgsFunction: c.completeOverridden(&f, func(_ []string, o *opsv1.ImageOverride) string { return podName(o.GetPod()) }),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(args[0], cmd.Flags().Changed("grace"))
			if err != nil {
				return err
			}
			ctx, stop := interruptible(cmd)
			defer stop()
			client, closeConn, err := c.dial(ctx)
			if err != nil {
				return err
			}
			defer closeConn()
			if f.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, f.timeout)
				defer cancel()
			}
			call, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			op, err := client.Restart(call, req)
			if err != nil {
				return plain(err)
			}
			if f.watch {
				return watchTo(ctx, c.view(cmd.OutOrStdout()), &supplier{OpsClient: client, req: req}, op.GetUid())
			}
			return c.printOperation(cmd.OutOrStdout(), op)
		},
	}
	fs := cmd.Flags()
	fs.StringArrayVarP(&f.containers, "container", "c", nil, "name of a container to restart; may be repeated")
	fs.DurationVar(&f.grace, "grace", 0, "time for preStop and stop together, in whole seconds (default: the pod's own)")
	fs.BoolVar(&f.ordered, "ordered", false, "restart the containers one after another, in the order given, and stop at the first failure")
	fs.StringVar(&f.order, "order", orderStopFirst, "StopFirst, or StartFirst to start the new container before the old one is stopped: for applications that share their port (SO_REUSEPORT) or have none")
	fs.DurationVar(&f.minReady, "min-ready", 0, "with StartFirst: how long the new container must have run before the old one is stopped, in whole seconds")
	fs.BoolVar(&f.force, "force", false, "restart even if the container is no longer the expected one")
	fs.StringArrayVar(&f.expect, "expect", nil, "refuse unless this is the ID of the running container; with several containers NAME=ID, repeated")
	fs.StringVar(&f.uid, "uid", "", "UID of the operation; giving it again does not restart again (default: a new one)")
	fs.BoolVarP(&f.watch, "watch", "w", false, "follow the operation to its end")
	fs.DurationVar(&f.timeout, "timeout", 0, "give up waiting after this long, the operation goes on (default: no limit)")
	fs.StringVar(&f.image, "image", "", "run this image in the place of the one in the pod's spec, until --revert-image")
	fs.BoolVar(&f.revert, "revert-image", false, "go back to the image of the pod's spec")
	fs.BoolVar(&f.always, "always", false, "ask the registry for the image even if it is there")
	fs.StringVar(&f.authFile, "auth-file", "", "docker config file with credentials of registries, such as ~/.docker/config.json")
	_ = cmd.MarkFlagFilename("auth-file", "json")                                                                                 // fails for an unknown flag only
	_ = cmd.RegisterFlagCompletionFunc("image", cobra.NoFileCompletions)                                                          // likewise
	_ = cmd.RegisterFlagCompletionFunc("container", c.completeOverridden(&f, func(args []string, o *opsv1.ImageOverride) string { // likewise
		if len(args) == 1 && args[0] == podName(o.GetPod()) {
			return o.GetContainer()
		}
		return ""
	}))
	_ = cmd.RegisterFlagCompletionFunc("order", cobra.FixedCompletions([]string{orderStopFirst, orderStartFirst}, cobra.ShellCompDirectiveNoFileComp)) // likewise
	return cmd
}

// request turns the command line into a request.
func (f *restartFlags) request(pod string, graceGiven bool) (*opsv1.RestartRequest, error) {
	ref, err := parsePod(pod)
	if err != nil {
		return nil, err
	}
	if len(f.containers) == 0 {
		return nil, usage("which container? give -c NAME, more than once for several")
	}
	if graceGiven && (f.grace < 0 || f.grace%time.Second != 0) {
		return nil, usage("--grace %s: want whole seconds, 0s or more", f.grace)
	}
	order, err := parseOrder(f.order, f.minReady)
	if err != nil {
		return nil, err
	}
	if err := f.checkImage(); err != nil {
		return nil, err
	}
	req := &opsv1.RestartRequest{
		Uid:       uidOr(f.uid),
		Pod:       ref,
		Ordered:   f.ordered,
		Force:     f.force,
		Requester: requester(),
	}
	for i, n := range f.containers {
		if slices.Contains(f.containers[:i], n) {
			return nil, usage("-c %s is given twice", n)
		}
		r := &opsv1.ContainerRestart{Name: n, Order: order, MinReadySeconds: int32(f.minReady / time.Second), Image: f.image, RevertImage: f.revert}
		if f.always {
			r.PullPolicy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
		}
		if graceGiven {
			seconds := int64(f.grace / time.Second)
			r.GracePeriodSeconds = &seconds
		}
		req.Containers = append(req.Containers, r)
	}
	if f.authFile != "" {
		if req.Credentials, err = readAuthFile(f.authFile); err != nil {
			return nil, usage("--auth-file: %w", err)
		}
	}
	for _, e := range f.expect {
		container, id, named := strings.Cut(e, "=")
		if !named {
			if len(f.containers) > 1 {
				return nil, usage("--expect %s: with several containers write NAME=ID", e)
			}
			container, id = f.containers[0], e
		}
		i := slices.Index(f.containers, container)
		if i < 0 || id == "" {
			return nil, usage("--expect %s: want NAME=ID with a NAME given as -c", e)
		}
		req.Containers[i].ExpectedContainerId = id
	}
	return req, nil
}

// checkImage checks the flags that are about another image.
func (f *restartFlags) checkImage() error {
	switch {
	case f.image != "" && f.revert:
		return usage("--image and --revert-image exclude each other")
	case f.image != "" && len(f.containers) > 1:
		return usage("--image is for one container: give one -c")
	case f.image == "" && !f.revert && f.authFile != "":
		return usage("--auth-file is for --image and --revert-image")
	case f.image == "" && !f.revert && f.always:
		return usage("--always is for --image and --revert-image")
	}
	return nil
}

// supplier hands the credentials over again when a watch begins anew: the daemon may have been restarted.
type supplier struct {
	opsv1.OpsClient
	req   *opsv1.RestartRequest
	again bool
}

func (s *supplier) WatchOperation(ctx context.Context, r *opsv1.WatchOperationRequest, o ...grpc.CallOption) (grpc.ServerStreamingClient[opsv1.Operation], error) {
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
	orderStopFirst  = "StopFirst"
	orderStartFirst = "StartFirst"
)

func parseOrder(order string, minReady time.Duration) (opsv1.Order, error) {
	switch {
	case minReady < 0 || minReady%time.Second != 0 || minReady > time.Hour:
		return 0, usage("--min-ready %s: want whole seconds, at most 1h", minReady)
	case order == orderStartFirst:
		return opsv1.Order_ORDER_START_FIRST, nil
	case order != orderStopFirst:
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

// uidOr returns the UID that was given, or a new one.
func uidOr(given string) string {
	if given != "" {
		return given
	}
	// 60 bits: short enough to type, and unique among the operations of a node's last hour.
	return "ctl-" + strings.ToLower(rand.Text()[:12])
}

// requester returns who asks, behind sudo too, for the daemon's audit line.
func requester() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return "ctl/" + name
	}
	if u, err := user.Current(); err == nil {
		return "ctl/" + u.Username
	}
	return "ctl"
}
