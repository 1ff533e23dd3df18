// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

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

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/util/duration"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// defaultCommitTimeout is how long the daemon waits for the change of the pod by default.
const defaultCommitTimeout = 10 * time.Minute

// SetImageOptions are the flags of `cri-proxy ctl set-image`. Zero durations stand for the daemon's
// defaults.
type SetImageOptions struct {
	// Containers are NAME=IMAGE.
	Containers     []string
	Order          string // StopFirst or StartFirst
	MinReady       time.Duration
	AuthFile       string
	Always         bool
	Pin            time.Duration
	PrepareTimeout time.Duration
	CommitTimeout  time.Duration
	UID            string // empty: a new one
	PrepareOnly    bool
	Watch          bool

	// Again are the words of the command line that continues after PrepareOnly, without its --uid.
	Again []string
	// People gets what is for people where the output is JSON or YAML.
	People io.Writer
}

// request turns the command line into a request.
func (o *SetImageOptions) request(pod string) (*opsv1.PrepareUpgradeRequest, error) {
	ref, err := parsePod(pod)
	if err != nil {
		return nil, err
	}
	if len(o.Containers) == 0 {
		return nil, usage("which container, and which image? give -c NAME=IMAGE, more than once for several")
	}
	for name, d := range map[string]time.Duration{
		"pin": o.Pin, "prepare-timeout": o.PrepareTimeout, "commit-timeout": o.CommitTimeout,
	} {
		if d < 0 {
			return nil, usage("--%s %s is negative", name, d)
		}
	}
	if o.PrepareOnly && o.Watch {
		return nil, usage("--prepare-only ends before there is anything to --watch")
	}
	order, err := parseOrder(o.Order, o.MinReady)
	if err != nil {
		return nil, err
	}
	req := &opsv1.PrepareUpgradeRequest{
		Uid: uidOr(o.UID), Pod: ref, Requester: Requester(),
		PinFor: optional(o.Pin), PrepareTimeout: optional(o.PrepareTimeout), HoldTimeout: optional(o.CommitTimeout),
	}
	for _, container := range o.Containers {
		name, image, _ := strings.Cut(container, "=")
		if name == "" || image == "" {
			return nil, usage("-c %s: want NAME=IMAGE", container)
		}
		given := func(c *opsv1.ContainerUpgrade) bool { return c.GetName() == name }
		if slices.ContainsFunc(req.GetContainers(), given) {
			return nil, usage("-c %s is given twice", name)
		}
		c := &opsv1.ContainerUpgrade{
			Name: name, Image: image, Order: order, MinReadySeconds: int32(o.MinReady / time.Second),
		}
		if o.Always {
			c.PullPolicy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
		}
		req.Containers = append(req.Containers, c)
	}
	req.Credentials, err = credentials(o.AuthFile)
	return req, err
}

// Run prepares new images for containers of the pod NAMESPACE/POD, shows the progress, and says how
// to change the pod. Until it has said that, SIGINT and SIGTERM undo everything.
func (o *SetImageOptions) Run(ctx context.Context, c Client, p *Printer, pod string) error {
	req, err := o.request(pod)
	if err != nil {
		return err
	}
	watched := ctx
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := opsv1.NewOpsClient(conn)
	// From here on ^C must not leave an image update behind that nobody wants any more.
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
			ended, err = client.AbortUpgrade(call, &opsv1.AbortUpgradeRequest{
				Uid: req.GetUid(), Reason: "cancelled by " + Requester(),
			})
			return err
		})
	}()
	view := p.view()
	op, err := makeReady(ctx, view, client, req, o.PrepareOnly)
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
	people := p
	if p.Format.structured() {
		people = p.to(o.People)
	}
	if byKubelet(op) {
		return people.words("The images are on the node, and kubelet makes the new containers itself (see the "+
			"warnings). "+
			"Change the pod when you like:\n  %s", setImage(req))
	}
	if err := o.tellNext(people, req); err != nil || !o.Watch {
		return err
	}
	if s, ok := view.(*screen); ok {
		s.drawn = 0 // what has been said stays
	}
	watched, stop := signal.NotifyContext(watched, unix.SIGINT, unix.SIGTERM)
	defer stop()
	signal.Stop(interrupts) // from here on ^C leaves: the pod may have been changed
	return watchTo(watched, view, client, req.GetUid())
}

func prepare(
	ctx context.Context, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest, o ...grpc.CallOption,
) error {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := client.PrepareUpgrade(call, req, o...)
	return err
}

// makeReady brings the image update to where the pod may be changed or, with prepareOnly, to where
// a commit may follow. The operation that it returns may also have ended.
func makeReady(
	ctx context.Context, view watchView, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest, prepareOnly bool,
) (*opsv1.Operation, error) {
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

// followUntil shows the operation until its phase is reached, or it has ended. If the daemon
// restarts meanwhile, followUntil sends the credentials to it once more.
func followUntil(
	ctx context.Context, view watchView, client opsv1.OpsClient, req *opsv1.PrepareUpgradeRequest,
	reached func(opsv1.Phase) bool,
) (*opsv1.Operation, error) {
	first := true
	op, err := follow(ctx, func(ctx context.Context, o ...grpc.CallOption) (operationStream, error) {
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

// isArmed reports whether the pod may be changed.
func isArmed(p opsv1.Phase) bool {
	return p == opsv1.Phase_PHASE_ARMED || p == opsv1.Phase_PHASE_STOPPING || p == opsv1.Phase_PHASE_ADOPTING
}

// byKubelet reports whether kubelet makes all new containers itself: such an operation brings the
// images only, and ends with the commit, before the pod is changed.
func byKubelet(op *opsv1.Operation) bool {
	other := func(r *opsv1.ContainerOperation) bool { return r.GetMethod() != opsv1.MethodKubelet }
	return op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED && !slices.ContainsFunc(op.GetContainers(), other)
}

// tellNext says what the user has to do now.
func (o *SetImageOptions) tellNext(p *Printer, req *opsv1.PrepareUpgradeRequest) error {
	timeout := o.CommitTimeout
	if timeout == 0 {
		timeout = defaultCommitTimeout
	}
	uid, within := req.GetUid(), duration.HumanDuration(timeout)
	if o.PrepareOnly {
		return p.words("Prepared. To go on within %s:\n  %s\nTo take it back: cri-proxy ctl cancel %s",
			within, shellLine(append(slices.Clip(o.Again), "--uid", uid)), uid)
	}
	if err := p.words("Ready. Now change the pod, within %s:\n  %s", within, setImage(req)); err != nil || o.Watch {
		return err
	}
	return p.words("To see what becomes of it: cri-proxy ctl ops %s --watch", uid)
}

// setImage is the command that changes the pod.
func setImage(req *opsv1.PrepareUpgradeRequest) string {
	command := fmt.Sprintf("kubectl -n %s set image pod/%s", req.GetPod().GetNamespace(), req.GetPod().GetName())
	for _, c := range req.GetContainers() {
		command += " " + shellWord(c.GetName()+"="+c.GetImage())
	}
	return command
}

// shellLine quotes the words of a command line.
func shellLine(words []string) string {
	quoted := make([]string, 0, len(words))
	for _, w := range words {
		quoted = append(quoted, shellWord(w))
	}
	return strings.Join(quoted, " ")
}

// shellWord quotes s unless a shell takes it as one plain word.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' ||
			strings.ContainsRune("-_./:=@%+,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
