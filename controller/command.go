// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// operationUID derives from the request, so that whoever sends the command again
// finds the operation that is there.
func (p *pass) operationUID(c *container) string { return string(p.crr.UID) + "." + c.name }

// podUID is the UID under which the node knows the pod.
func (p *pass) podUID() string {
	if p.pod != nil && p.pod.Annotations[mirrorAnnotation] != "" {
		return p.pod.Annotations[mirrorAnnotation]
	}
	return p.accepted.PodUID
}

// podIP is where httpGet hooks without a host go. The runtime does not know it of a pod in the host's network.
func (p *pass) podIP() string {
	if p.pod == nil {
		return ""
	}
	return p.pod.Status.PodIP
}

// node is where to reach the node of the request.
func (p *pass) node(ctx context.Context) (Node, error) {
	var n corev1.Node
	if err := p.r.Client.Get(ctx, client.ObjectKey{Name: p.accepted.NodeName}, &n); err != nil {
		if apierrors.IsNotFound(err) {
			return Node{}, fmt.Errorf("node %s does not exist any more", p.accepted.NodeName)
		}
		return Node{}, err
	}
	port := p.r.NodePort
	if port == 0 {
		port = DefaultNodePort
	}
	return nodeOf(&n, port)
}

// know takes in what a unary call said of the container's operation.
func (p *pass) know(node Node, c *container, op *opsv1.Operation) {
	p.memory.operations[op.GetUid()] = true
	p.r.watches.set(node, client.ObjectKeyFromObject(p.crr), op)
	op, _, _ = p.r.watches.get(op.GetUid()) // a stream may have said more already
	if c.op = accountOf(op, c.name); c.op == nil {
		c.fail("operation %s of node %s is not about this container", op.GetUid(), node.Name)
	}
}

// accountOf is the operation's account of one container, nil without.
func accountOf(op *opsv1.Operation, name string) *opsv1.ContainerOperation {
	for _, c := range op.GetContainers() {
		if c.GetName() == name {
			return c
		}
	}
	return nil
}

// lookUp finds the node's account of each container that has one.
func (p *pass) lookUp(ctx context.Context) {
	for _, c := range p.containers {
		c.ended = p.memory.ended[c.name]
	}
	p.recallEnded(ctx)
	for _, c := range p.containers {
		if c.done() {
			continue
		}
		if s, ok := p.memory.standIns[c.name]; ok {
			c.op, c.replaced = s.op, s.replaced
			continue
		}
		op, heard, watched := p.r.watches.get(p.operationUID(c))
		c.op = accountOf(op, c.name)
		age := p.r.now().Sub(heard)
		switch {
		case op == nil && c.state.Phase != recreating:
			continue // not commanded yet, as far as anyone remembers
		case op == nil, op.GetFinishTime() == nil && (age >= pollWatched || !watched && age >= pollUnwatched):
			if p.trouble == nil {
				p.ask(ctx, c)
			}
		}
		p.findReplacement(ctx, c)
	}
}

// operation is the node's account of the operation on a container.
func (p *pass) operation(ctx context.Context, c *container) (Node, *opsv1.Operation, error) {
	node, err := p.node(ctx)
	if err != nil {
		return node, nil, err
	}
	op, err := p.r.Nodes.GetOperation(ctx, node, p.operationUID(c))
	return node, op, err
}

// ask gets the operation from the node.
func (p *pass) ask(ctx context.Context, c *container) {
	node, op, err := p.operation(ctx, c)
	switch {
	case err == nil:
		p.know(node, c, op)
	case code(err) == codes.NotFound:
		p.lost(c)
	default:
		p.temporary(err)
	}
}

// lost decides what becomes of a container whose operation the node has forgotten,
// by age or because its journal is gone.
func (p *pass) lost(c *container) {
	p.r.watches.forget(p.operationUID(c))
	c.op = nil
	switch {
	case c.status != nil && c.status.ContainerID != "" && c.status.ContainerID != c.pinned.ContainerID && c.status.RestartCount > c.pinned.RestartCount:
		// It ran: take the pod's word.
		c.op = &opsv1.ContainerOperation{
			Name: c.name, Phase: opsv1.Phase_PHASE_SUCCEEDED, IncumbentId: bareID(c.pinned.ContainerID),
			SuccessorId: bareID(c.status.ContainerID), Attempt: uint32(c.status.RestartCount),
		}
		p.memory.standIns[c.name] = standIn{op: c.op}
	case !c.state.IsKilled:
		c.state.Phase = pending // command it again: the expected ID keeps it from running twice
	default:
		// Stopped, and the pod does not show a new one yet. kubelet's policy
		// applies to it now; the pod tells how it ends.
		c.op = &opsv1.ContainerOperation{Name: c.name, Phase: opsv1.Phase_PHASE_STARTING}
	}
}

// command starts the container's operation on the node.
func (p *pass) command(ctx context.Context, c *container) {
	log := p.log.WithField("container", c.name).WithField("op", p.operationUID(c))
	node, err := p.node(ctx)
	if err != nil {
		p.temporary(err)
		return
	}
	if !p.sparesJob(ctx, node, c) {
		return
	}
	request, err := p.restartRequest(ctx, c)
	var missing *environment.MissingError
	switch {
	case errors.As(err, &missing):
		log.WithError(err).Info("restart not commanded")
		c.fail("not recreated, and left as it was: %s", err)
		return
	case err != nil:
		p.temporary(err)
		return
	}
	op, err := p.r.Nodes.Restart(ctx, node, request)
	if code(err) == codes.AlreadyExists {
		// Sent by a controller of another version, which put some detail otherwise.
		op, err = p.r.Nodes.GetOperation(ctx, node, p.operationUID(c))
	}
	switch {
	case err == nil:
		p.know(node, c, op)
		log.Info("restart commanded")
	case p.temporary(err):
		return
	case refusalReason(err) == reasonExpectedIDDiffers:
		c.op = &opsv1.ContainerOperation{Name: c.name, Phase: opsv1.Phase_PHASE_FAILED, Reason: reasonExpectedIDDiffers, Message: err.Error()}
	default:
		log.WithError(err).Info("node refused the restart")
		c.fail("%s", err)
		if endedBefore(refusalReason(err)) {
			p.noteEnded(c)
		}
		return
	}
	p.findReplacement(ctx, c)
}

// sparesJob says that a restart may be commanded as far as the Job of the pod is concerned: other restarts may have come since the request
// was accepted. A restart that the node has begun already goes on, whoever commanded it.
func (p *pass) sparesJob(ctx context.Context, node Node, c *container) bool {
	if c.status == nil || c.status.ContainerID != c.pinned.ContainerID || mayEndJob(p.crr, c.strategy) {
		return true
	}
	uid := p.operationUID(c)
	why, err := p.r.Jobs.Take(ctx, p.r.APIReader, p.pod, uid, map[string]string{c.name: c.pinned.ContainerID})
	switch {
	case err != nil:
		p.temporary(err)
		return false
	case why == "":
		p.memory.operations[uid] = true
		return true
	}
	op, err := p.r.Nodes.GetOperation(ctx, node, uid)
	switch {
	case err == nil:
		p.know(node, c, op)
	case code(err) == codes.NotFound:
		c.fail("not recreated: %s", orForce(why))
	default:
		p.temporary(err)
	}
	return false
}

// refusalReason is the CamelCase reason the node gave with an error.
func refusalReason(err error) string {
	var nodeError *NodeError
	if !errors.As(err, &nodeError) {
		return ""
	}
	for _, detail := range status.Convert(nodeError.Err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// restartRequest is the command, with what kubelet would start the container with now.
//
// Errors: a *[environment.MissingError], or the API server's.
func (p *pass) restartRequest(ctx context.Context, c *container) (*opsv1.RestartRequest, error) {
	want := &opsv1.ContainerRestart{
		Name: c.name, ExpectedContainerId: c.pinned.ContainerID, GracePeriodSeconds: c.strategy.grace,
	}
	if p.pod != nil && apiequality.Semantic.DeepEqual(c.strategy.grace, p.pod.Spec.TerminationGracePeriodSeconds) {
		want.GracePeriodSeconds = nil // the pod's own, filled in at admission: the node knows it, and takes longer ones than a request may ask for
	}
	want.HoldProbes = HoldProbes(c.spec, c.carried)
	if c.strategy.startFirst {
		want.Order, want.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, int32(c.strategy.minStarted/time.Second)
	}
	if c.spec != nil && c.spec.Lifecycle != nil {
		// A preStop that cannot be resolved is not sent: the node finds it on the container and says what is wrong
		// with it. A postStart that cannot be is refused in identify.
		want.PreStop, _ = hookOf(c.spec, c.spec.Lifecycle.PreStop, p.podIP())
		want.PostStart, _ = hookOf(c.spec, c.spec.Lifecycle.PostStart, p.podIP())
	}
	r := &opsv1.RestartRequest{
		Uid:        p.operationUID(c),
		Pod:        &opsv1.PodRef{Namespace: p.crr.Namespace, Name: p.crr.Spec.PodName, Uid: p.podUID()},
		Containers: []*opsv1.ContainerRestart{want},
		Force:      c.strategy.force,
		Requester:  fmt.Sprintf("ContainerRecreateRequest/%s/%s/%s", p.crr.Namespace, p.crr.Name, p.crr.UID),
	}
	if p.pod == nil || c.spec == nil {
		return r, nil
	}
	now, err := environment.Read(ctx, p.r.APIReader, p.pod)
	if err != nil {
		return nil, err
	}
	if want.Environment, err = now.Container(ctx, c.name); err != nil {
		return nil, err
	}
	spec, _ := containerSpec(now.Pod(), c.name)
	want.PullPolicy = environment.PullPolicy(spec.ImagePullPolicy)
	want.RunAsNonRoot, want.RunAsUser = RunAs(now.Pod(), spec)
	r.Credentials, err = pullsecrets.Of(ctx, p.r.APIReader, now.Pod(), pullsecrets.Pulled(spec.Image, want.PullPolicy, want.Environment))
	return r, err
}

// RunAs is what the pod says of the user of its container: whether it may not be root, and which one, nil if that is left to the image. The
// container's security context goes before the pod's.
func RunAs(pod *corev1.Pod, c *corev1.Container) (nonRoot bool, user *int64) {
	if s := pod.Spec.SecurityContext; s != nil {
		nonRoot, user = s.RunAsNonRoot != nil && *s.RunAsNonRoot, s.RunAsUser
	}
	if s := c.SecurityContext; s != nil {
		if s.RunAsNonRoot != nil {
			nonRoot = *s.RunAsNonRoot
		}
		if s.RunAsUser != nil {
			user = s.RunAsUser
		}
	}
	return nonRoot, user
}

// findReplacement settles an operation that the node refused because the container
// is no longer the pinned one. If other operations replaced it, which must have
// been after the request was accepted, the request is satisfied by the container
// they left; otherwise it crashed or kubelet replaced it, and the request fails.
func (p *pass) findReplacement(ctx context.Context, c *container) {
	if c.replaced || c.op.GetPhase() != opsv1.Phase_PHASE_FAILED || c.op.GetReason() != reasonExpectedIDDiffers {
		return
	}
	refusal := c.op
	c.op = nil
	node, err := p.node(ctx)
	if err != nil {
		p.temporary(err)
		return
	}
	operations, err := p.r.Nodes.ListOperations(ctx, node)
	if err != nil {
		if !p.temporary(err) {
			c.fail("%s", err)
		}
		return
	}
	c.op = replacement(operations, p.podUID(), c.name, bareID(c.pinned.ContainerID))
	if c.op == nil {
		c.op = proto.Clone(refusal).(*opsv1.ContainerOperation)
		c.op.Message = fmt.Sprintf("container %s is no longer the one the request was made for (%s): it has ended since and kubelet has started it again, so it was left alone; create another request, or set forceRecreate",
			c.name, c.pinned.ContainerID)
	} else {
		c.replaced = true
	}
	p.memory.standIns[c.name] = standIn{op: c.op, replaced: c.replaced}
}

// replacement follows the operations that replaced a container, from the ID it had
// to the last one.
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

// cancelLeftOver cancels operations that wait on the node and that an earlier
// failure leaves out. It says whether that changed anything.
func (p *pass) cancelLeftOver(ctx context.Context, containers []*container) bool {
	changed := false
	for _, c := range containers {
		uid := p.operationUID(c)
		if p.trouble != nil || p.memory.cancelAsked[uid] {
			continue
		}
		node, err := p.node(ctx)
		if err != nil {
			p.temporary(err)
			continue
		}
		op, err := p.r.Nodes.CancelOperation(ctx, node, uid, "an earlier container of the request failed and failurePolicy is Fail")
		switch {
		case err == nil:
			p.memory.cancelAsked[uid] = true
			p.know(node, c, op)
			changed = true
		case !p.temporary(err):
			p.memory.cancelAsked[uid] = true // too late, it runs to its end
		}
	}
	return changed
}

// cancel takes a container's operation back if it still can be, and says what came
// of it.
func (p *pass) cancel(ctx context.Context, c *container, reason string) string {
	node, err := p.node(ctx)
	var op *opsv1.Operation
	if err == nil && p.trouble == nil {
		op, err = p.r.Nodes.CancelOperation(ctx, node, p.operationUID(c), reason)
	} else if err == nil {
		err = p.trouble // no use asking a silent node for every container
	}
	account := accountOf(op, c.name)
	if account.GetStopTime() != nil && !c.replaced {
		c.state.IsKilled = true
	}
	switch {
	case err != nil && code(err) == codes.FailedPrecondition:
		return "the container was already being stopped, the node finishes the restart"
	case err != nil && code(err) == codes.NotFound:
		if c.state.IsKilled {
			return "the container had been stopped"
		}
		if c.replaced || c.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED {
			return "the new container is not ready"
		}
		return "the container had not been stopped and was left alone"
	case err != nil:
		p.temporary(err)
		return fmt.Sprintf("the node could not be told to leave the container alone: %s", err)
	case account.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED:
		return "the new container is not ready"
	case account.GetPhase() == opsv1.Phase_PHASE_FAILED:
		return Account(account)
	case account.GetPhase() == opsv1.Phase_PHASE_CANCELLED:
		return "the container had not been stopped and was left alone"
	default:
		return "the node takes back what it has prepared"
	}
}
