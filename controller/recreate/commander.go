// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
)

// commander talks to the node of a request.
type commander struct {
	*request
	// trouble is the first temporary error of the node in this reconcile.
	trouble error
}

// temporary notes an error of the node that may pass, and says whether it may.
func (n *commander) temporary(err error) bool {
	var nodeError *nodes.Error
	if errors.As(err, &nodeError) && !nodeError.Temporary() {
		return false
	}
	if n.trouble == nil {
		n.trouble = err
	}
	return true
}

// podUID is the UID under which the node knows the pod.
func (n *commander) podUID() string {
	if n.pod != nil && n.pod.Annotations[corev1.MirrorPodAnnotationKey] != "" {
		return n.pod.Annotations[corev1.MirrorPodAnnotationKey]
	}
	return n.accepted.PodUID
}

// podIP is where httpGet hooks without a host go. The runtime does not know the IP of a pod in the
// host's network.
func (n *commander) podIP() string {
	if n.pod == nil {
		return ""
	}
	return n.pod.Status.PodIP
}

// node is where to reach the node of the request.
func (n *commander) node(ctx context.Context) (nodes.Node, error) {
	var node corev1.Node
	if err := n.r.Client.Get(ctx, client.ObjectKey{Name: n.accepted.NodeName}, &node); err != nil {
		if apierrors.IsNotFound(err) {
			return nodes.Node{}, fmt.Errorf("node %s does not exist any more", n.accepted.NodeName)
		}
		return nodes.Node{}, err
	}
	return nodes.Of(&node, n.r.NodePort)
}

// know takes in the answer of a unary call about the container's operation.
func (n *commander) know(node nodes.Node, c *container, op *opsv1.Operation) {
	f := nodes.Follow[*opsv1.Operation]{
		Node: node, UID: op.GetUid(), For: n.key(),
		End: func(_ context.Context, s nodes.State[*opsv1.Operation]) bool { return s.Err != nil },
	}
	n.memory.operations[f.Key()] = true
	n.r.tracker.Note(f.For, node, op)
	op = n.r.tracker.Ensure(f).Op // a stream may have said more already
	if c.op = accountOf(op, c.name); c.op == nil {
		c.fail("operation %s of node %s is not about this container", op.GetUid(), node.Name)
	}
}

// accountOf returns the operation's account of one container, or nil.
func accountOf(op *opsv1.Operation, name string) *opsv1.ContainerOperation {
	for _, c := range op.GetContainers() {
		if c.GetName() == name {
			return c
		}
	}
	return nil
}

// lookUp finds the node's account of each container that has one.
func (n *commander) lookUp(ctx context.Context) {
	for _, c := range n.containers {
		c.ended = n.memory.ended[c.name]
	}
	n.recallEnded(ctx)
	for _, c := range n.containers {
		if c.done() {
			continue
		}
		if s, ok := n.memory.standIns[c.name]; ok {
			c.op, c.replaced = s.op, s.replaced
			continue
		}
		s, known := n.r.tracker.Get(n.operation(c))
		c.op = accountOf(s.Op, c.name)
		age := n.r.now().Sub(s.Heard)
		switch {
		case !known && c.state.Phase != recreating:
			continue // not commanded yet, as far as anyone remembers
		case !known, !s.Finished() && (age >= pollWatched || !s.Watched && age >= pollUnwatched):
			if n.trouble == nil {
				n.ask(ctx, c)
			}
		}
		n.findReplacement(ctx, c)
	}
}

// getOperation gets the operation on a container from the node.
func (n *commander) getOperation(ctx context.Context, c *container) (nodes.Node, *opsv1.Operation, error) {
	node, err := n.node(ctx)
	if err != nil {
		return node, nil, err
	}
	op, err := n.r.Nodes.GetOperation(ctx, node, n.operationUID(c))
	return node, op, err
}

// ask gets the operation from the node, and takes in the answer.
func (n *commander) ask(ctx context.Context, c *container) {
	node, op, err := n.getOperation(ctx, c)
	switch {
	case err == nil:
		n.know(node, c, op)
	case nodes.NotFound(err):
		n.lost(c)
	default:
		n.temporary(err)
	}
}

// lost decides what becomes of a container whose operation the node has forgotten, by age or
// because its journal is gone.
func (n *commander) lost(c *container) {
	n.r.tracker.Forget(n.operation(c))
	c.op = nil
	switch s := c.status; {
	case s != nil && s.ContainerID != "" && s.ContainerID != c.pinned.ContainerID &&
		s.RestartCount > c.pinned.RestartCount:
		// The operation ran: believe the pod.
		c.op = &opsv1.ContainerOperation{
			Name: c.name, Phase: opsv1.Phase_PHASE_SUCCEEDED, IncumbentId: pods.BareID(c.pinned.ContainerID),
			SuccessorId: pods.BareID(s.ContainerID), Attempt: uint32(s.RestartCount),
		}
		n.memory.standIns[c.name] = standIn{op: c.op}
	case !c.state.IsKilled:
		c.state.Phase = pending // command it again: the expected ID keeps it from running twice
	default:
		// Stopped, and the pod does not show a new container yet. kubelet's policy applies now; the
		// pod tells how it ends.
		c.op = &opsv1.ContainerOperation{Name: c.name, Phase: opsv1.Phase_PHASE_STARTING}
	}
}

// noteEnded keeps that the container had ended by itself: the status says only that it has failed.
func (n *commander) noteEnded(c *container) { c.ended, n.memory.ended[c.name] = true, true }

// recallEnded finds out, after another controller has been at work, which of the failed containers
// had ended by themselves. The node knows those whose operation it had begun. If it knows nothing
// it had refused the command, and then the pod tells: a container that the node refused for another
// reason still runs.
func (n *commander) recallEnded(ctx context.Context) {
	if n.memory.recalled {
		return
	}
	n.memory.recalled = true
	if n.done() {
		return // nothing depends on it any more
	}
	for _, c := range n.containers {
		if c.state.Phase != failed || c.state.IsKilled {
			continue
		}
		var op *opsv1.Operation
		if n.trouble == nil {
			var err error
			if _, op, err = n.getOperation(ctx, c); err != nil {
				n.temporary(err)
			}
		}
		switch s := c.status; {
		case n.trouble != nil:
			// Command nothing now, and leave no container alone before the node has answered.
			c.ended, n.memory.recalled = true, false
		case op != nil && opsv1.EndedBefore(accountOf(op, c.name).GetReason()),
			op == nil && s != nil && (s.ContainerID != c.pinned.ContainerID || s.State.Running == nil):
			n.noteEnded(c)
		}
	}
}

// command starts the container's operation on the node.
func (n *commander) command(ctx context.Context, c *container) {
	log := n.log.WithField("container", c.name).WithField("op", n.operationUID(c))
	node, err := n.node(ctx)
	if err != nil {
		n.temporary(err)
		return
	}
	if !n.sparesJob(ctx, node, c) {
		return
	}
	restart, err := n.restartRequest(ctx, c)
	var missing *environment.MissingError
	switch {
	case errors.As(err, &missing):
		log.WithError(err).Info("restart not commanded")
		c.fail("not recreated, and left as it was: %s", err)
		return
	case err != nil:
		n.temporary(err)
		return
	}
	op, err := n.r.Nodes.Restart(ctx, node, restart)
	if nodes.Code(err) == codes.AlreadyExists {
		// A controller of another version sent the command, with some detail put otherwise.
		op, err = n.r.Nodes.GetOperation(ctx, node, n.operationUID(c))
	}
	switch {
	case err == nil:
		n.know(node, c, op)
		log.Info("restart commanded")
	case n.temporary(err):
		return
	case nodes.Reason(err) == opsv1.ReasonExpectedIDDiffers:
		c.op = &opsv1.ContainerOperation{
			Name: c.name, Phase: opsv1.Phase_PHASE_FAILED, Reason: opsv1.ReasonExpectedIDDiffers, Message: err.Error(),
		}
	default:
		log.WithError(err).Info("node refused the restart")
		c.fail("%s", err)
		if opsv1.EndedBefore(nodes.Reason(err)) {
			n.noteEnded(c)
		}
		return
	}
	n.findReplacement(ctx, c)
}

// sparesJob says that the restart leaves the Job of the pod alone: other restarts may have come
// since the request was accepted. A restart that the node has begun goes on, whoever commanded it.
func (n *commander) sparesJob(ctx context.Context, node nodes.Node, c *container) bool {
	if c.status == nil || c.status.ContainerID != c.pinned.ContainerID || accept.MayEndJob(n.crr, c.strategy) {
		return true
	}
	uid := n.operationUID(c)
	why, err := n.r.Jobs.Take(ctx, n.r.APIReader, n.pod, uid, map[string]string{c.name: c.pinned.ContainerID})
	switch {
	case err != nil:
		n.temporary(err)
		return false
	case why == "":
		n.memory.operations[n.operation(c)] = true
		return true
	}
	op, err := n.r.Nodes.GetOperation(ctx, node, uid)
	switch {
	case err == nil:
		n.know(node, c, op)
	case nodes.NotFound(err):
		c.fail("not recreated: %s", accept.OrForce(why))
	default:
		n.temporary(err)
	}
	return false
}

// restartRequest returns the command, with what kubelet would start the container with now.
//
// Errors: a *[environment.MissingError], or the API server's.
func (n *commander) restartRequest(ctx context.Context, c *container) (*opsv1.RestartRequest, error) {
	want := &opsv1.ContainerRestart{
		Name: c.name, ExpectedContainerId: c.pinned.ContainerID, GracePeriodSeconds: c.strategy.Grace,
	}
	if n.pod != nil && apiequality.Semantic.DeepEqual(c.strategy.Grace, n.pod.Spec.TerminationGracePeriodSeconds) {
		// The pod's own period, filled in at admission. The node knows it, and takes longer ones
		// than a request may ask for.
		want.GracePeriodSeconds = nil
	}
	want.HoldProbes = pods.HoldProbes(c.spec, c.carried)
	if c.strategy.StartFirst {
		want.Order, want.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, int32(c.strategy.MinStarted/time.Second)
	}
	if c.spec != nil && c.spec.Lifecycle != nil {
		// A preStop that cannot be resolved is not sent: the node finds it on the container and
		// says what is wrong. identify refuses a postStart that cannot be resolved.
		want.PreStop, _ = pods.Hook(c.spec, c.spec.Lifecycle.PreStop, n.podIP())
		want.PostStart, _ = pods.Hook(c.spec, c.spec.Lifecycle.PostStart, n.podIP())
	}
	r := &opsv1.RestartRequest{
		Uid:        n.operationUID(c),
		Pod:        &opsv1.PodRef{Namespace: n.crr.Namespace, Name: n.crr.Spec.PodName, Uid: n.podUID()},
		Containers: []*opsv1.ContainerRestart{want},
		Force:      c.strategy.Force,
		Requester:  fmt.Sprintf("ContainerRecreateRequest/%s/%s/%s", n.crr.Namespace, n.crr.Name, n.crr.UID),
	}
	if n.pod == nil || c.spec == nil {
		return r, nil
	}
	now, err := environment.Read(ctx, n.r.APIReader, n.pod)
	if err != nil {
		return nil, err
	}
	if want.Environment, err = now.Container(ctx, c.name); err != nil {
		return nil, err
	}
	spec, _ := pods.Container(now.Pod(), c.name)
	want.PullPolicy = environment.PullPolicy(spec.ImagePullPolicy)
	want.RunAsNonRoot, want.RunAsUser = pods.RunAs(now.Pod(), spec)
	r.Credentials, err = pullsecrets.Of(ctx, n.r.APIReader, now.Pod(),
		pullsecrets.Pulled(spec.Image, want.PullPolicy, want.Environment))
	return r, err
}

// findReplacement settles an operation that the node refused because the container is no longer the
// pinned one. If other operations replaced the container, which must have been after the request
// was accepted, their last container satisfies the request. Otherwise the container crashed or
// kubelet replaced it, and the request fails.
func (n *commander) findReplacement(ctx context.Context, c *container) {
	if c.replaced || c.op.GetPhase() != opsv1.Phase_PHASE_FAILED || c.op.GetReason() != opsv1.ReasonExpectedIDDiffers {
		return
	}
	refusal := c.op
	c.op = nil
	node, err := n.node(ctx)
	if err != nil {
		n.temporary(err)
		return
	}
	operations, err := n.r.Nodes.ListOperations(ctx, node)
	if err != nil {
		if !n.temporary(err) {
			c.fail("%s", err)
		}
		return
	}
	c.op = replacement(operations, n.podUID(), c.name, pods.BareID(c.pinned.ContainerID))
	if c.op == nil {
		c.op = proto.Clone(refusal).(*opsv1.ContainerOperation)
		c.op.Message = fmt.Sprintf("container %s is no longer the one the request was made for (%s): it has "+
			"ended since "+
			"and kubelet has started it again, so it was left alone; create another request, or set forceRecreate",
			c.name, c.pinned.ContainerID)
	} else {
		c.replaced = true
	}
	n.memory.standIns[c.name] = standIn{op: c.op, replaced: c.replaced}
}

// replacement follows the operations that replaced a container, from the given ID to the last one.
func replacement(operations []*opsv1.Operation, podUID, name, id string) *opsv1.ContainerOperation {
	successors := map[string]*opsv1.ContainerOperation{}
	for _, op := range operations {
		if op.GetPod().GetUid() != podUID {
			continue
		}
		if c := accountOf(op, name); c.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
			successors[c.GetIncumbentId()] = c
		}
	}
	var last *opsv1.ContainerOperation
	for c := successors[id]; c != nil; c = successors[c.GetSuccessorId()] {
		last = c
		delete(successors, c.GetIncumbentId()) // never round and round
	}
	return last
}

// cancelLeftOver cancels operations that wait on the node and that an earlier failure leaves out.
// It says whether that changed anything.
func (n *commander) cancelLeftOver(ctx context.Context, containers []*container) bool {
	changed := false
	for _, c := range containers {
		uid := n.operationUID(c)
		if n.trouble != nil || n.memory.cancelAsked[uid] {
			continue
		}
		node, err := n.node(ctx)
		if err != nil {
			n.temporary(err)
			continue
		}
		const why = "an earlier container of the request failed and failurePolicy is Fail"
		op, err := n.r.Nodes.CancelOperation(ctx, node, uid, why)
		switch {
		case err == nil:
			n.memory.cancelAsked[uid] = true
			n.know(node, c, op)
			changed = true
		case !n.temporary(err):
			n.memory.cancelAsked[uid] = true // too late: the operation runs to its end
		}
	}
	return changed
}

// cancel takes a container's operation back if it still can be, and says what came of it.
func (n *commander) cancel(ctx context.Context, c *container, reason string) string {
	node, err := n.node(ctx)
	var op *opsv1.Operation
	if err == nil && n.trouble == nil {
		op, err = n.r.Nodes.CancelOperation(ctx, node, n.operationUID(c), reason)
	} else if err == nil {
		err = n.trouble // no use asking a silent node for every container
	}
	account := accountOf(op, c.name)
	if account.GetStopTime() != nil && !c.replaced {
		c.state.IsKilled = true
	}
	switch {
	case err != nil && nodes.Code(err) == codes.FailedPrecondition:
		return "the container was already being stopped, the node finishes the restart"
	case err != nil && nodes.NotFound(err):
		if c.state.IsKilled {
			return "the container had been stopped"
		}
		if c.replaced || c.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
			return "the new container is not ready"
		}
		return "the container had not been stopped and was left alone"
	case err != nil:
		n.temporary(err)
		return fmt.Sprintf("the node could not be told to leave the container alone: %s", err)
	case account.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED:
		return "the new container is not ready"
	case account.GetPhase() == opsv1.Phase_PHASE_FAILED:
		return nodes.Account(account)
	case account.GetPhase() == opsv1.Phase_PHASE_CANCELLED:
		return "the container had not been stopped and was left alone"
	default:
		return "the node takes back what it has prepared"
	}
}
