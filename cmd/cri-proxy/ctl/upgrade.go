// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/util/duration"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// defaultHold is the daemon's hold_timeout.
const defaultHold = 10 * time.Minute

// upgradeFlags are the flags of `ctl upgrade`.
type upgradeFlags struct {
	containers  []string
	order       string
	minReady    time.Duration
	authFile    string
	always      bool
	pin         time.Duration
	prepare     time.Duration
	hold        time.Duration
	uid         string
	prepareOnly bool
	watch       bool
}

func (c *ctl) upgrade() *cobra.Command {
	var f upgradeFlags
	cmd := &cobra.Command{
		Use:   "upgrade NAMESPACE/POD -c NAME=IMAGE [-c NAME=IMAGE...]",
		Short: "Make everything ready for new images of a pod's containers",
		Long: `Pull the new images, check them and create the new containers beside the old ones,
which go on. Then kubectl set image on the pod, which this command prints, lets them
take over within milliseconds; kubelet and the pod see an ordinary change of image.

IMAGE must be to the letter what the pod's spec will have. If the pod belongs to a
workload, the workload's template is not changed: pods that it makes later have the
old image. An InPlaceRollout changes both.

Credentials of the auth file go to the daemon, which keeps them in memory only.

^C before that takes everything back. The exit code is 1 if the containers are not
ready in the end; with --watch, if they have not taken over.`,
		Example: `  cri-proxy ctl upgrade default/web -c app=registry.example/app:v2 --watch
  cri-proxy ctl upgrade default/web -c app=registry.example/app:v2 --order StartFirst --min-ready 5s
  cri-proxy ctl cancel UID`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage("name one pod: cri-proxy ctl upgrade NAMESPACE/POD -c NAME=IMAGE")
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(args[0])
			if err != nil {
				return err
			}
			return c.runUpgrade(cmd, req, &f)
		},
	}
	fs := cmd.Flags()
	fs.StringArrayVarP(&f.containers, "container", "c", nil, "name of a container and its new image; may be repeated")
	fs.StringVar(&f.order, "order", orderStopFirst, "StopFirst, or StartFirst to start the new container before the old one is stopped: for applications that share their port (SO_REUSEPORT) or have none")
	fs.DurationVar(&f.minReady, "min-ready", 0, "with StartFirst: how long the new container must have run before it is ready, in whole seconds")
	fs.StringVar(&f.authFile, "auth-file", "", "docker config file with credentials of registries, such as ~/.docker/config.json")
	fs.BoolVar(&f.always, "always", false, "ask the registry even if the image is there: for containers with imagePullPolicy Always")
	fs.DurationVar(&f.pin, "pin", 0, "keep the images, old and new, from kubelet's image garbage collection for this long (default: 24h)")
	fs.DurationVar(&f.prepare, "prepare-timeout", 0, "longest time for all that comes before the pod is changed (default: 30m)")
	fs.DurationVar(&f.hold, "hold-timeout", 0, "how long to wait for the pod to be changed, before everything is taken back (default: 10m)")
	fs.StringVar(&f.uid, "uid", "", "UID of the operation; giving it again goes on with that one (default: a new one)")
	fs.BoolVar(&f.prepareOnly, "prepare-only", false, "pull, check and create only; the same command with --uid goes on from there")
	fs.BoolVarP(&f.watch, "watch", "w", false, "follow the operation to its end, when kubelet has taken the new containers over")
	_ = cmd.MarkFlagFilename("auth-file", "json")                                                                                                      // fails for an unknown flag only
	_ = cmd.RegisterFlagCompletionFunc("container", cobra.NoFileCompletions)                                                                           // likewise
	_ = cmd.RegisterFlagCompletionFunc("order", cobra.FixedCompletions([]string{orderStopFirst, orderStartFirst}, cobra.ShellCompDirectiveNoFileComp)) // likewise
	return cmd
}

// request turns the command line into a request.
func (f *upgradeFlags) request(pod string) (*opsv1.PrepareUpgradeRequest, error) {
	ref, err := parsePod(pod)
	if err != nil {
		return nil, err
	}
	if len(f.containers) == 0 {
		return nil, usage("which container, and which image? give -c NAME=IMAGE, more than once for several")
	}
	for name, d := range map[string]time.Duration{"pin": f.pin, "prepare-timeout": f.prepare, "hold-timeout": f.hold} {
		if d < 0 {
			return nil, usage("--%s %s is negative", name, d)
		}
	}
	if f.prepareOnly && f.watch {
		return nil, usage("--prepare-only ends before there is anything to --watch")
	}
	order, err := parseOrder(f.order, f.minReady)
	if err != nil {
		return nil, err
	}
	req := &opsv1.PrepareUpgradeRequest{
		Uid: uidOr(f.uid), Pod: ref, Requester: requester(),
		PinFor: optional(f.pin), PrepareTimeout: optional(f.prepare), HoldTimeout: optional(f.hold),
	}
	for _, container := range f.containers {
		name, image, _ := strings.Cut(container, "=")
		if name == "" || image == "" {
			return nil, usage("-c %s: want NAME=IMAGE", container)
		}
		if slices.ContainsFunc(req.GetContainers(), func(c *opsv1.ContainerUpgrade) bool { return c.GetName() == name }) {
			return nil, usage("-c %s is given twice", name)
		}
		c := &opsv1.ContainerUpgrade{Name: name, Image: image, Order: order, MinReadySeconds: int32(f.minReady / time.Second)}
		if f.always {
			c.PullPolicy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
		}
		req.Containers = append(req.Containers, c)
	}
	if f.authFile != "" {
		if req.Credentials, err = readAuthFile(f.authFile); err != nil {
			return nil, usage("--auth-file: %w", err)
		}
	}
	return req, nil
}

func (c *ctl) runUpgrade(cmd *cobra.Command, req *opsv1.PrepareUpgradeRequest, f *upgradeFlags) error {
	ctx, leave := context.WithCancelCause(cmd.Context())
	defer leave(nil)
	client, closeConn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer closeConn()
	// From here on ^C must not leave an upgrade behind that nobody has asked for.
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, unix.SIGINT, unix.SIGTERM)
	defer signal.Stop(interrupts)
	if err := prepare(ctx, client, req); err != nil {
		return plain(err)
	}
	aborted := make(chan error, 1)
	over := make(chan struct{})
	var ended *opsv1.Operation // by the signal; written before aborted is sent to
	go func() {                // ends with over
		aborted <- cancelOnInterrupt(ctx, interrupts, over, leave, func(call context.Context) (err error) {
			ended, err = client.AbortUpgrade(call, &opsv1.AbortUpgradeRequest{Uid: req.GetUid(), Reason: "cancelled by " + requester()})
			return err
		})
	}()
	out := cmd.OutOrStdout()
	view := c.view(out)
	op, err := makeReady(ctx, view, client, req, f.prepareOnly)
	close(over)
	aerr := <-aborted
	switch {
	case errors.Is(context.Cause(ctx), errLeft):
		return fmt.Errorf("left while the upgrade is being taken back; see cri-proxy ctl ops %s", req.GetUid())
	case aerr != nil:
		return plain(aerr)
	case ended != nil:
		return outcome(ended)
	case err != nil:
		return plain(err)
	case op.GetFinishTime() != nil && !byKubelet(op):
		return outcome(op)
	}
	if c.output.structured() {
		out = cmd.ErrOrStderr() // for people
	}
	if byKubelet(op) {
		_, err := fmt.Fprintf(out, "The images are on the node, and kubelet makes the new containers itself (see the warnings). Change the pod when you like:\n  %s\n", setImage(req))
		return err
	}
	if err := tellNext(cmd, out, req, f); err != nil || !f.watch {
		return err
	}
	if s, ok := view.(*screen); ok {
		s.drawn = 0 // what has been said stays
	}
	watched, stop := interruptible(cmd)
	defer stop()
	signal.Stop(interrupts) // from here on ^C leaves: the pod may have been changed
	return watchTo(watched, view, client, req.GetUid())
}

func prepare(ctx context.Context, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest, o ...grpc.CallOption) error {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := client.PrepareUpgrade(call, req, o...)
	return err
}

// makeReady brings the upgrade to where the pod may be changed, or only to where it may be committed, and returns it as it is
// then: it may also have ended.
func makeReady(ctx context.Context, view watchView, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest, prepareOnly bool) (*opsv1.Operation, error) {
	op, err := followUntil(ctx, view, client, req, isPrepared)
	if err != nil || prepareOnly || op.GetFinishTime() != nil {
		return op, err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := client.CommitUpgrade(call, &opsv1.CommitUpgradeRequest{Uid: req.GetUid()}); err != nil {
		return op, err
	}
	return followUntil(ctx, view, client, req, isArmed)
}

// errReached ends a watch before the operation ends.
var errReached = errors.New("reached")

// followUntil shows the operation until reached says so, or it has ended. A daemon that has been restarted on the way gets
// the credentials again.
func followUntil(ctx context.Context, view watchView, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest, reached func(opsv1.Phase) bool) (*opsv1.Operation, error) {
	first := true
	op, err := follow(ctx, func(ctx context.Context, o ...grpc.CallOption) (grpc.ServerStreamingClient[opsv1.Operation], error) {
		if !first && len(req.GetCredentials()) > 0 {
			if err := prepare(ctx, client, req, o...); err != nil {
				return nil, err
			}
		}
		first = false
		return client.WatchOperation(ctx, &opsv1.WatchOperationRequest{Uid: req.GetUid()}, o...)
	}, func(op *opsv1.Operation) error {
		if err := view.update(op); err != nil {
			return err
		}
		if op.GetFinishTime() == nil && reached(op.GetPhase()) {
			return errReached
		}
		return nil
	})
	if errors.Is(err, errReached) {
		err = nil
	}
	return op, err
}

func isPrepared(p opsv1.Phase) bool {
	return p == opsv1.Phase_PHASE_PREPARED || isArmed(p)
}

// isArmed is true from where the pod may be changed.
func isArmed(p opsv1.Phase) bool {
	return p == opsv1.Phase_PHASE_ARMED || p == opsv1.Phase_PHASE_STOPPING || p == opsv1.Phase_PHASE_ADOPTING
}

// byKubelet reports whether only the images were to be made ready: that ends with the commit, before the pod is changed.
func byKubelet(op *opsv1.Operation) bool {
	return op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED &&
		!slices.ContainsFunc(op.GetContainers(), func(r *opsv1.ContainerOperation) bool { return r.GetMethod() != methodKubelet })
}

// methodKubelet is the method of a container that kubelet makes by itself.
const methodKubelet = "kubelet"

// tellNext says what the user has to do now.
func tellNext(cmd *cobra.Command, out io.Writer, req *opsv1.PrepareUpgradeRequest, f *upgradeFlags) error {
	hold := f.hold
	if hold == 0 {
		hold = defaultHold
	}
	uid, within := req.GetUid(), duration.HumanDuration(hold)
	if f.prepareOnly {
		_, err := fmt.Fprintf(out, "Prepared. To go on within %s:\n  %s\nTo take it back: cri-proxy ctl cancel %s\n", within, again(cmd, req, f), uid)
		return err
	}
	_, err := fmt.Fprintf(out, "Ready. Now change the pod, within %s:\n  %s\n", within, setImage(req))
	if err != nil || f.watch {
		return err
	}
	_, err = fmt.Fprintf(out, "To see what becomes of it: cri-proxy ctl ops %s --watch\n", uid)
	return err
}

// setImage is the command that changes the pod.
func setImage(req *opsv1.PrepareUpgradeRequest) string {
	command := fmt.Sprintf("kubectl -n %s set image pod/%s", req.GetPod().GetNamespace(), req.GetPod().GetName())
	for _, c := range req.GetContainers() {
		command += " " + shellWord(c.GetName()+"="+c.GetImage())
	}
	return command
}

// again is the command line that goes on with what has been prepared: the same request with its UID.
func again(cmd *cobra.Command, req *opsv1.PrepareUpgradeRequest, f *upgradeFlags) string {
	words := []string{"cri-proxy", "ctl", "upgrade", podName(req.GetPod())}
	for _, c := range f.containers {
		words = append(words, "-c", c)
	}
	cmd.Flags().Visit(func(flag *pflag.Flag) {
		switch flag.Name {
		case "container", "uid", "prepare-only", "watch", "output":
		default:
			words = append(words, "--"+flag.Name+"="+flag.Value.String())
		}
	})
	words = append(words, "--uid", req.GetUid())
	for i := range words {
		words[i] = shellWord(words[i])
	}
	return strings.Join(words, " ")
}

// shellWord quotes what a shell would not take as one plain word.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:=@%+,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
