// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// pinFor is longer than rollouts take; the pins are released at their end.
	pinFor = 7 * 24 * time.Hour
	// holdFor is how long a node keeps what is ready: the budget may let a pod wait.
	holdFor = time.Hour
	// tellPause is the first pause between two tries to tell a node something; it doubles up to tellPauseMax.
	tellPause    = 500 * time.Millisecond
	tellPauseMax = 5 * time.Second
	// gaveWayPause is how long after it gave way a preparation is made again: the pod's status may
	// not show the new container at once.
	gaveWayPause = 2 * time.Second
	// watchRenew is how long a stream may be without news: then it is asked whether the node is still there.
	watchRenew = time.Minute
	// prepareSlack is how much longer than it may a node takes to say that a preparation has taken too long.
	prepareSlack = 15 * time.Second
	// secretsFor is how long secrets that were read are good.
	secretsFor = 5 * time.Minute
)

// reasonCredentials is the node's word for a pull that has outlived the process which had its credentials.
const reasonCredentials = "CredentialsNeeded"

// reasonUnchanged is the node's word for an image that is that of the container's spec already, as far as the node knows.
const reasonUnchanged = "ImageUnchanged"

// reasonOther is the node's word for a container that would have been all right.
const reasonOther = "OtherContainerFailed"

// reasonCancelled is the node's word for a preparation that gave way to a restart, or that somebody
// has cancelled, and reasonDiffers that for one that has found another container than it was to
// find.
const (
	reasonCancelled = "Cancelled"
	reasonDiffers   = "ExpectedIDDiffers"
)

// reasonHeld is the node's word for a preparation that has waited for its turn for holdFor.
const reasonHeld = "HoldTimeout"

// again are the node's reasons for the end of a preparation that is worth another try: nothing was touched, and what was in
// the way has passed.
var again = []string{"HoldTimeout", "TakenBackByKubelet", "ExpectedIDDiffers", "ContainerNotRunning", "Cancelled", "Aborted", "JournalError", "RuntimeError", "PodStopping", "NotFound"} //nolint:gochecknoglobals // a constant

// conversation is one talk and what it is about.
type conversation struct {
	r    *Reconciler
	w    *work
	t    *talk
	node nodes.Node
	// pod is its name.
	pod string
	// begin starts the operation, or finds it.
	begin func(context.Context) (*opsv1.Operation, error)
	// patience is how long the node may be away.
	patience time.Duration
}

// start lets the conversation run until the operation has ended.
func (c *conversation) start() {
	c.r.crew.Do(func(ctx context.Context) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		c.w.mu.Lock()
		c.t.cancel = cancel
		over := c.t.over
		c.w.mu.Unlock()
		if !over {
			c.run(ctx)
		}
	})
}

func (c *conversation) run(ctx context.Context) {
	var silent time.Time
	for tries := 0; ; tries++ {
		op, err := c.begin(ctx)
		c.w.noteAPI(c.t, err)
		if err == nil {
			silent, tries = time.Time{}, 0
			c.note(op)
			if op.GetFinishTime() != nil {
				return
			}
			if op, err = c.watch(ctx, op.GetUid()); err == nil && op.GetFinishTime() != nil {
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errThere) {
			c.change(func() { c.t.same = true })
			return
		}
		if err != nil {
			if t := troubleOf(err); t.final || t.stale {
				c.change(func() { c.t.failed, c.t.stale, c.t.asked = &t.failure, t.stale, true })
				return
			} else if silent.IsZero() {
				silent = time.Now()
			} else if time.Since(silent) >= c.patience {
				if apiStatus(err) {
					t.failure = tooLong(c.pod, c.patience, err)
				}
				c.change(func() { c.t.failed, c.t.asked = &t.failure, true })
				return
			}
		}
		if !pause(ctx, min(tellPause<<min(tries, 4), tellPauseMax)) {
			return
		}
	}
}

// errThere says that a container has already what the API server makes of its image.
var errThere = errors.New("the image is there")

// noteAPI counts what goes wrong with the API server, for people to be told.
func (w *work) noteAPI(t *talk, err error) {
	w.mu.Lock()
	if err == nil {
		t.api = apiTrouble{}
	} else if apiStatus(err) {
		t.api.note(err, time.Now())
	}
	tell := t.api.count == apierror.Tries
	w.mu.Unlock()
	if tell {
		w.wake()
	}
}

// watch follows the operation until it has ended, needs credentials, or there has been no news for a while.
func (c *conversation) watch(ctx context.Context, uid string) (*opsv1.Operation, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	patience := time.AfterFunc(watchRenew, cancel)
	defer patience.Stop()
	var last *opsv1.Operation
	err := c.r.Nodes.WatchOperation(watching, c.node, uid, func(op *opsv1.Operation) {
		patience.Reset(watchRenew)
		last = op
		c.note(op)
		if slices.ContainsFunc(op.GetContainers(), func(x *opsv1.ContainerOperation) bool { return x.GetPull().GetReason() == reasonCredentials }) {
			cancel()
		}
	})
	if watching.Err() != nil {
		err = nil // it is asked again
	}
	return last, err
}

// note keeps what the node says. A finished operation stays as it is.
func (c *conversation) note(op *opsv1.Operation) {
	c.change(func() {
		c.t.asked = true
		if c.t.op.GetFinishTime() != nil {
			return
		}
		if was := c.t.op.GetCreateTime(); was != nil && !proto.Equal(was, op.GetCreateTime()) {
			c.t.committed = false // the node has lost its journal and begun anew
		}
		c.t.op = op
	})
}

func (c *conversation) change(f func()) {
	c.w.mu.Lock()
	over := c.t.over
	if !over {
		f()
	}
	c.w.mu.Unlock()
	if !over {
		c.w.wake()
	}
}

// prepare lets the node of a pod make the images ready.
func (p *pass) prepare(ctx context.Context, i *item) {
	w, m := p.work, i.m
	p.look(ctx, i)
	if p.imagesReady(i) != unprepared {
		return
	}
	uid := p.upgradeUID(i)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.visit != nil && m.visit.uid == uid {
		return
	}
	if old := m.visit; old != nil {
		p.abort(m.node, old, "something else is wanted of the pod")
		old.end()
	}
	t := &talk{uid: uid, begun: p.now}
	m.visit = t
	node, err := p.node(ctx, i.pod)
	if err != nil {
		// A node that is taken away takes its pods with it, soon.
		if m.lost.IsZero() {
			m.lost = p.now
		}
		if p.now.Sub(m.lost) >= p.strategy.deadline {
			t.failed = &failure{failUnreachable, err.Error()}
		} else {
			m.visit = nil
			p.again(m, tellPauseMax)
		}
		return
	}
	m.node, w.nodes[node.Name] = node, node
	if m.mark != nil && m.mark.Operation != uid && p.now.Sub(m.mark.Time.Time) >= p.strategy.deadline {
		p.abortMarked(m, "something else is wanted of the pod, and kubelet has not come for this")
	}
	request := p.prepareRequest(ctx, i, uid)
	label := p.newLabel(i)
	c := &conversation{r: p.r, w: w, t: t, node: node, pod: i.pod.Name, patience: p.strategy.deadline}
	change, err := p.change(i, uid, nil)
	if err != nil {
		t.failed = &failure{failPreparation, err.Error()}
		return
	}
	have := podImages(i.pod)
	c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
		w.mu.Lock()
		phase := t.op.GetPhase()
		w.mu.Unlock()
		if armed(phase) { // the pod may be changed already: nobody needs to ask whether it may be
			if op, err := p.r.Nodes.GetOperation(ctx, node, uid); code(err) != codes.NotFound {
				return op, err
			}
		}
		answers, more, err := p.r.dryRun(ctx, i.pod, change)
		if err == nil && len(more) > 0 {
			w.learnMore(m, t, more)
			return nil, errThere // all of them are prepared together
		}
		if err == nil && len(answers) > 0 { // is it the same each time?
			err = p.r.stillSo(ctx, i, change, answers)
		}
		if err != nil {
			return nil, err
		}
		there := 0
		for _, c := range request.GetContainers() {
			if c.Image = answers.of(c.GetName(), change.images[c.GetName()]); c.Image == have[c.GetName()] {
				there++
			}
		}
		if there > 0 {
			w.learn(m, t, change.images, answers)
			return nil, errThere // those that are not are prepared without those that are
		}
		now, err := p.r.launch(ctx, w, i.pod, label)
		if err != nil {
			return nil, err
		}
		var images []string
		for _, c := range request.GetContainers() {
			if c.PullPolicy, c.Environment, err = now.container(ctx, c.GetName()); err != nil {
				return nil, err
			}
			images = append(images, pullsecrets.Pulled(c.GetImage(), c.GetPullPolicy(), c.GetEnvironment())...)
		}
		request.Credentials = now.ring.For(images...)
		op, err := p.r.Nodes.PrepareUpgrade(ctx, node, request)
		if code(err) == codes.AlreadyExists {
			// By a controller of another version, which put some detail otherwise.
			op, err = p.r.Nodes.GetOperation(ctx, node, uid)
		}
		if err != nil {
			return nil, err
		}
		// What the node has ready may be what was answered before.
		for _, has := range op.GetContainers() {
			if asked := change.images[has.GetName()]; asked != "" && has.GetImage() != answers.of(has.GetName(), asked) {
				err = unsteady("pod "+i.pod.Name, has.GetName(), asked, has.GetImage(), answers.of(has.GetName(), asked))
				c.change(func() { t.op, t.failed, t.asked = op, refusal(err), true })
				return nil, err
			}
		}
		w.learn(m, t, change.images, answers)
		return op, nil
	}
	c.start()
	p.log.WithField("pod", i.pod.Name).WithField("op", uid).Debug("preparing")
}

// upgradeUID is what the node of a pod calls its upgrade.
func (p *pass) upgradeUID(i *item) string {
	ids, _ := idsOf(i.pod, sortedKeys(i.verdict.images))
	return operationUID("u", i.goal, i.pod, ids, i.m.round)
}

func (p *pass) prepareRequest(ctx context.Context, i *item, uid string) *opsv1.PrepareUpgradeRequest {
	request := p.upgradeRequest(i, uid)
	for _, name := range sortedKeys(i.verdict.images) {
		c, _ := containerOf(i.pod, name)
		u := &opsv1.ContainerUpgrade{Name: name, Image: i.verdict.images[name], Order: opsv1.Order_ORDER_STOP_FIRST}
		if cs := statusOf(i.pod, name); cs != nil {
			u.ExpectedContainerId = cs.ContainerID
		}
		if c.StartupProbe != nil {
			u.HoldProbes = pods.HoldProbes(c, p.carries(ctx, i.pod))
		}
		if p.strategy.startFirst {
			u.Order, u.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, p.strategy.besideSeconds()
		}
		u.RunAsNonRoot, u.RunAsUser = pods.RunAs(i.pod, c)
		request.Containers = append(request.Containers, u)
	}
	return request
}

// upgradeRequest is a request without containers.
func (p *pass) upgradeRequest(i *item, uid string) *opsv1.PrepareUpgradeRequest {
	owner := ownerOf(p.rollout)
	return &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: podRef(i.pod), Requester: owner, Owner: owner, PinFor: durationpb.New(pinFor),
		PrepareTimeout: durationpb.New(p.strategy.deadline), HoldTimeout: durationpb.New(holdFor),
	}
}

// commit announces the patch to the node.
func (p *pass) commit(i *item) {
	w, t, node := p.work, i.m.visit, i.m.node
	w.mu.Lock()
	if t.committed {
		w.mu.Unlock()
		return
	}
	t.committed = true
	w.mu.Unlock()
	label, answers := p.newLabel(i), i.m.answersOf(w)
	images := answers.all(i.verdict.images)
	change, err := p.change(i, t.uid, answers)
	if err != nil {
		w.mu.Lock()
		t.failed = &failure{failPreparation, err.Error()}
		w.mu.Unlock()
		return
	}
	p.r.crew.Do(func(ctx context.Context) {
		var since time.Time
		for tries := 0; ; tries++ {
			err := p.r.stillSo(ctx, i, change, answers)
			var request *opsv1.CommitUpgradeRequest
			if err == nil {
				request, err = p.r.commitRequest(ctx, w, i.pod, label, t.uid, images)
			}
			var op *opsv1.Operation
			if err == nil {
				op, err = p.r.Nodes.CommitUpgrade(ctx, node, request)
			}
			w.mu.Lock()
			over := t.over || t.op.GetFinishTime() != nil
			if err == nil && !over && op.GetPhase() != t.op.GetPhase() && t.op.GetPhase() == opsv1.Phase_PHASE_PREPARED {
				t.op = op // unless the stream was quicker
			}
			w.mu.Unlock()
			if !over {
				w.noteAPI(t, err)
			}
			tr := troubleOf(err)
			if !apiStatus(err) {
				since = time.Time{}
			} else if since.IsZero() {
				since = time.Now()
			} else if time.Since(since) >= p.strategy.deadline && !tr.final && !tr.stale {
				tr.failure, tr.final = tooLong(i.pod.Name, p.strategy.deadline, err), true
			}
			if err == nil || over || ctx.Err() != nil || tr.final || tr.stale {
				if err != nil && !over && ctx.Err() == nil {
					w.mu.Lock()
					t.failed, t.stale = &tr.failure, tr.stale
					w.mu.Unlock()
				}
				w.wake()
				return
			}
			if !pause(ctx, min(tellPause<<min(tries, 4), tellPauseMax)) {
				return
			}
		}
	})
}

// stillSo asks the API server once more, before the node is told that the patch comes.
func (r *Reconciler) stillSo(ctx context.Context, i *item, change *podChange, before rewrites) error {
	now, more, err := r.dryRun(ctx, i.pod, change)
	if err != nil {
		return err
	}
	for name, image := range more {
		// Somebody has changed the pod meanwhile, or admission knows more than when the node was asked: from the start, then.
		return apierrors.NewConflict(corev1.Resource("pods"), i.pod.Name, fmt.Errorf("container %s gets image %s", name, image))
	}
	if name, differs := now.differs(before, change.images); differs {
		asked := change.images[name]
		return unsteady("pod "+i.pod.Name, name, asked, before.of(name, asked), now.of(name, asked))
	}
	return nil
}

// commitRequest is the commit, with what kubelet will start the containers with; images are the new ones, by container.
func (r *Reconciler) commitRequest(ctx context.Context, w *work, pod *corev1.Pod, label, uid string, images map[string]string) (*opsv1.CommitUpgradeRequest, error) {
	now, err := r.launch(ctx, w, pod, label)
	if err != nil {
		return nil, err
	}
	request := &opsv1.CommitUpgradeRequest{Uid: uid}
	var pulled []string
	for _, name := range sortedKeys(images) {
		policy, env, err := now.container(ctx, name)
		if err != nil {
			return nil, err
		}
		pulled = append(pulled, pullsecrets.Pulled(images[name], policy, env)...)
		request.Environments = append(request.Environments, &opsv1.ContainerEnvironment{Name: name, Environment: env})
	}
	request.Credentials = now.ring.For(pulled...)
	return request, nil
}

// launch is what kubelet starts the containers of a pod with.
type launch struct {
	reader *environment.Reader
	ring   *pullsecrets.Keyring // nil for a pod that a node has made
}

// launch reads what kubelet would start the containers of a pod with now, or, with a label, once the pod has that revision.
func (r *Reconciler) launch(ctx context.Context, w *work, pod *corev1.Pod, label string) (*launch, error) {
	now, err := environment.Read(ctx, r.APIReader, pod)
	if err != nil {
		return nil, err
	}
	if label != "" {
		now.Label(revisionLabel, label)
	}
	if mirrorpod.Is(pod) {
		return &launch{reader: now}, nil
	}
	ring, err := r.keyring(ctx, w, pod.Namespace, pod.Spec.ServiceAccountName, secretNames(pod))
	if err != nil {
		return nil, err
	}
	return &launch{reader: now, ring: ring}, nil
}

func (l *launch) container(ctx context.Context, name string) (opsv1.PullPolicy, *opsv1.Environment, error) {
	env, err := l.reader.Container(ctx, name)
	if err != nil {
		return 0, nil, err
	}
	c, _ := containerOf(l.reader.Pod(), name)
	return environment.PullPolicy(c.ImagePullPolicy), env, nil
}

func (l *launch) image(name string) string {
	c, _ := containerOf(l.reader.Pod(), name)
	return c.Image
}

// newLabel is the label of the revision that the pod will have with its new images; empty if it has none.
func (p *pass) newLabel(i *item) string {
	if p.target.workload == nil {
		return ""
	}
	return p.target.workload.revisionLabel(i, i.verdict.images)
}

// abort tells a node to take an upgrade back. If it cannot be told, what it has prepared ends after holdFor. The caller holds the
// mutex of work.
func (p *pass) abort(node nodes.Node, t *talk, why string) {
	if t == nil || t.op == nil || t.op.GetFinishTime() != nil || t.op.GetKind() == "Restart" {
		return
	}
	p.takeBack(node, t.uid, why)
}

// memberOf finds the member of a pod, or makes it. What the node has made ready of another revision is taken back, unless the pod was changed for it.
func (p *pass) memberOf(pod *corev1.Pod) *member {
	m, dropped := p.work.memberOf(pod, p.goal.revision)
	if dropped != nil && !m.stale(pod) && (m.mark == nil || m.mark.Operation != dropped.uid) {
		p.work.mu.Lock()
		defer p.work.mu.Unlock()
		p.abort(m.node, dropped, "something else is wanted of the pod")
	}
	return m
}

// keep forgets the pods that are no more the rollout's. What nodes have made ready for them is taken back.
func (p *pass) keep(pods map[types.UID]bool) {
	p.work.mu.Lock()
	for uid, m := range p.work.members {
		if t := m.visit; !pods[uid] && t != nil && (m.mark == nil || m.mark.Operation != t.uid) {
			p.abort(m.node, t, "the pod is not the rollout's any more")
		}
	}
	p.work.mu.Unlock()
	p.work.keep(pods)
}

// abortMarked tells the node to take back the upgrade that the pod was last changed for, if that is this rollout's and kubelet has not begun
// with it: the node would keep it ready, and the container from whatever comes next. The caller holds the mutex of work.
func (p *pass) abortMarked(m *member, why string) {
	if m.mark != nil && m.mark.Rollout == p.rollout.UID && m.mark.Operation != "" && m.node.Name != "" {
		p.takeBack(m.node, m.mark.Operation, why)
	}
}

func (p *pass) takeBack(node nodes.Node, uid, why string) {
	p.r.crew.Do(func(ctx context.Context) {
		for tries := range 5 {
			_, err := p.r.Nodes.AbortUpgrade(ctx, node, uid, why)
			if t := troubleOf(err); err == nil || t.final || t.stale || !pause(ctx, tellPause<<tries) {
				return
			}
		}
	})
}

// follow listens to the operation of a pod that was changed already.
func (p *pass) follow(ctx context.Context, i *item) {
	w, m, uid := p.work, i.m, i.m.mark.Operation
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.visit != nil && m.visit.uid == uid {
		return
	}
	m.visit.end()
	t := &talk{uid: uid}
	m.visit = t
	node, err := p.node(ctx, i.pod)
	if err != nil {
		t.asked = true // there is nobody to ask
		return
	}
	m.node, w.nodes[node.Name] = node, node
	p.listen(t, node, i.pod.Name)
}

// listen lets a conversation follow an operation that has been begun. One that the node does not know, or no longer, has ended.
func (p *pass) listen(t *talk, node nodes.Node, pod string) {
	c := &conversation{r: p.r, w: p.work, t: t, node: node, pod: pod, patience: p.strategy.deadline}
	c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
		op, err := p.r.Nodes.GetOperation(ctx, node, t.uid)
		if code(err) == codes.NotFound {
			c.change(func() { t.asked = true })
			return &opsv1.Operation{Uid: t.uid, FinishTime: stampProto(p.now), Phase: opsv1.Phase_PHASE_CANCELLED}, nil
		}
		return op, err
	}
	c.start()
}

// inquire asks the node whether it is still at work on the restarts of a mark that is another goal's: of a rollout that has ended or is gone,
// or of an earlier revision.
func (p *pass) inquire(ctx context.Context, i *item) {
	w, m := p.work, i.m
	uid := m.mark.restartUID(i.pod)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.restart != nil && m.restart.uid == uid {
		return
	}
	m.restart.end()
	t := &talk{uid: uid, inquires: true}
	m.restart = t
	node, err := p.node(ctx, i.pod)
	if err != nil {
		t.asked = true // there is nobody to ask
		w.wake()
		return
	}
	p.listen(t, node, i.pod.Name)
}

// restart lets the node restart the containers of a pod that keep their images.
func (p *pass) restart(ctx context.Context, i *item) {
	w, m := p.work, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	request := p.restartRequest(ctx, i)
	if m.restart != nil && m.restart.uid == request.GetUid() {
		return
	}
	m.restart.end()
	t := &talk{uid: request.GetUid()}
	m.restart = t
	node, err := p.node(ctx, i.pod)
	if err != nil {
		t.failed = &failure{failUnreachable, err.Error()}
		return
	}
	m.node, w.nodes[node.Name] = node, node
	c := &conversation{r: p.r, w: w, t: t, node: node, pod: i.pod.Name, patience: p.strategy.deadline}
	c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
		now, err := p.r.launch(ctx, w, i.pod, "")
		if err != nil {
			return nil, err
		}
		var images []string
		for _, c := range request.GetContainers() {
			if c.PullPolicy, c.Environment, err = now.container(ctx, c.GetName()); err != nil {
				return nil, err
			}
			images = append(images, pullsecrets.Pulled(now.image(c.GetName()), c.GetPullPolicy(), c.GetEnvironment())...)
		}
		request.Credentials = now.ring.For(images...)
		op, err := p.r.Nodes.Restart(ctx, node, request)
		if code(err) == codes.AlreadyExists {
			op, err = p.r.Nodes.GetOperation(ctx, node, request.GetUid())
		}
		return op, err
	}
	c.start()
}

func (p *pass) restartRequest(ctx context.Context, i *item) *opsv1.RestartRequest {
	request := &opsv1.RestartRequest{Uid: i.m.mark.restartUID(i.pod), Pod: podRef(i.pod), Requester: ownerOf(p.rollout)}
	for _, name := range sortedKeys(i.m.mark.Containers) {
		c, _ := containerOf(i.pod, name)
		old := i.m.mark.Containers[name]
		if c == nil || c.Image != old.Image || old.ID == "" {
			continue
		}
		want := &opsv1.ContainerRestart{Name: name, ExpectedContainerId: old.ID, GracePeriodSeconds: p.strategy.grace}
		want.RunAsNonRoot, want.RunAsUser = pods.RunAs(i.pod, c)
		if c.StartupProbe != nil {
			want.HoldProbes = pods.HoldProbes(c, p.carries(ctx, i.pod))
		}
		if p.strategy.startFirst {
			want.Order, want.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, p.strategy.besideSeconds()
		}
		if c.Lifecycle != nil {
			// A hook that cannot be resolved is not sent: kubelet could not run it either.
			want.PreStop, _ = pods.Hook(c, c.Lifecycle.PreStop, i.pod.Status.PodIP)
			want.PostStart, _ = pods.Hook(c, c.Lifecycle.PostStart, i.pod.Status.PodIP)
		}
		request.Containers = append(request.Containers, want)
	}
	return request
}

// keyring reads secrets, if that was not just done.
func (r *Reconciler) keyring(ctx context.Context, w *work, namespace, account string, names []string) (*pullsecrets.Keyring, error) {
	if account == "" {
		account = pullsecrets.DefaultAccount
	}
	key := fmt.Sprint(account, names)
	w.mu.Lock()
	k := w.keys[key]
	w.mu.Unlock()
	if k != nil && time.Since(k.at) < secretsFor {
		return k.ring, nil
	}
	ring, err := pullsecrets.Read(ctx, r.APIReader, namespace, account, names, "imagePullSecrets")
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keys[key] = &keys{ring, time.Now()}
	return ring, nil
}

func secretNames(pod *corev1.Pod) []string {
	var names []string
	for _, s := range pod.Spec.ImagePullSecrets {
		names = append(names, s.Name)
	}
	return names
}

func podRef(pod *corev1.Pod) *opsv1.PodRef {
	return &opsv1.PodRef{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)}
}

// pause waits and says whether to go on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
