// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

const (
	// pinFor is longer than any rollout takes. At its end the rollout releases the pins.
	pinFor = 7 * 24 * time.Hour
	// holdFor is how long a node keeps a prepared upgrade: a budget may hold the pod back.
	holdFor = time.Hour
	// retryInterval is the first wait between two calls of a node that fails. It doubles up to retryIntervalMax.
	tellPause    = 500 * time.Millisecond
	tellPauseMax = 5 * time.Second
	// gaveWayInterval is how long to wait after a preparation gave way to a restart: the pod's status may not show the new
	// container at once.
	gaveWayPause = 2 * time.Second
	// watchRenew is how long a stream may be without news. Then the node is asked again, to see whether it is still there.
	watchRenew = time.Minute
	// prepareSlack is how long a node may be late with the message that a preparation has taken too long.
	prepareSlack = 15 * time.Second
	// secretsFor is how long secrets count as fresh after they were read.
	secretsFor = 5 * time.Minute
)

// reasonCredentials is the node's reason for a pull whose credentials are lost, because the daemon was restarted.
const reasonCredentials = "CredentialsNeeded"

// reasonUnchanged is the node's reason for an image that the container has already, as far as the node knows.
const reasonUnchanged = "ImageUnchanged"

// reasonCancelled is the node's reason for a preparation that gave way to a restart, or that somebody has cancelled. reasonDiffers is
// the reason for one that has not found the expected container.
const (
	reasonCancelled = "Cancelled"
	reasonDiffers   = "ExpectedIDDiffers"
)

// reasonHeld is the node's reason for a prepared upgrade that was not committed within holdFor.
const reasonHeld = "HoldTimeout"

// again are the node's reasons for which a preparation is worth another try: the node has changed nothing, and the obstacle has passed.
var again = []string{"HoldTimeout", "TakenBackByKubelet", "ExpectedIDDiffers", "ContainerNotRunning", "Cancelled", "Aborted", "JournalError", "RuntimeError", "PodStopping", "NotFound"} //nolint:gochecknoglobals // a constant

// Prepare has the node of a pod prepare the change: check the tags, and pull the images.
func (s *session) prepare(ctx context.Context, i *item) {
	w, m := s.state, i.m
	s.look(ctx, i)
	if s.imagesReady(i) != unprepared {
		return
	}
	uid := s.upgradeUID(i)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.visit != nil && m.visit.uid == uid {
		return
	}
	if old := m.visit; old != nil {
		s.abort(m.node, old, "something else is wanted of the pod")
		old.end()
	}
	t := &talk{uid: uid, begun: s.now}
	m.visit = t
	node, err := s.driver.node(ctx, i.pod)
	if err != nil {
		// If the node was removed, its pods will be gone soon, too.
		if m.lost.IsZero() {
			m.lost = s.now
		}
		if s.now.Sub(m.lost) >= s.strategy.deadline {
			t.failed = &failure{failUnreachable, err.Error()}
		} else {
			m.visit = nil
			s.again(m, tellPauseMax)
		}
		return
	}
	m.node, w.nodes[node.Name] = node, node
	if m.mark != nil && m.mark.Operation != uid && s.now.Sub(m.mark.Time.Time) >= s.strategy.deadline {
		s.abortMarked(m, "something else is wanted of the pod, and kubelet has not come for this")
	}
	request := s.prepareRequest(ctx, i, uid)
	label := s.newLabel(i)
	c := &conversation{d: s.driver, w: w, t: t, node: node, pod: i.pod.Name, patience: s.strategy.deadline}
	change, err := s.change(i, uid, nil)
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
			if op, err := s.driver.nodes.GetOperation(ctx, node, uid); code(err) != codes.NotFound {
				return op, err
			}
		}
		answers, more, err := dryRun(ctx, s.driver.client, i.pod, change)
		if err == nil && len(more) > 0 {
			w.learnMore(m, t, more)
			return nil, errThere // all of them are prepared together
		}
		if err == nil && len(answers) > 0 { // is it the same each time?
			err = s.driver.stillSo(ctx, i, change, answers)
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
		now, err := s.driver.launch(ctx, w, i.pod, label)
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
		op, err := s.driver.nodes.PrepareUpgrade(ctx, node, request)
		if code(err) == codes.AlreadyExists {
			// A controller of another version has begun it, with some other detail.
			op, err = s.driver.nodes.GetOperation(ctx, node, uid)
		}
		if err != nil {
			return nil, err
		}
		// The node may have prepared what admission answered before.
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
	s.log.WithField("pod", i.pod.Name).WithField("op", uid).Debug("preparing")
}

// upgradeUID returns the UID of the node's operation that upgrades a pod.
func (s *session) upgradeUID(i *item) string {
	ids, _ := idsOf(i.pod, slices.Sorted(maps.Keys(i.verdict.images)))
	return operationUID("u", i.goal, i.pod, ids, i.m.round)
}

func (s *session) prepareRequest(ctx context.Context, i *item, uid string) *opsv1.PrepareUpgradeRequest {
	request := s.upgradeRequest(i, uid)
	for _, name := range slices.Sorted(maps.Keys(i.verdict.images)) {
		c, _ := containerOf(i.pod, name)
		u := &opsv1.ContainerUpgrade{Name: name, Image: i.verdict.images[name], Order: opsv1.Order_ORDER_STOP_FIRST}
		if cs := statusOf(i.pod, name); cs != nil {
			u.ExpectedContainerId = cs.ContainerID
		}
		if c.StartupProbe != nil {
			u.HoldProbes = controller.HoldProbes(c, s.driver.carries(ctx, i.pod))
		}
		if s.strategy.startFirst {
			u.Order, u.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, s.strategy.besideSeconds()
		}
		u.RunAsNonRoot, u.RunAsUser = controller.RunAs(i.pod, c)
		request.Containers = append(request.Containers, u)
	}
	return request
}

// upgradeRequest returns a request without containers.
func (s *session) upgradeRequest(i *item, uid string) *opsv1.PrepareUpgradeRequest {
	owner := ownerOf(s.rollout)
	return &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: refOf(i.pod), Requester: owner, Owner: owner, PinFor: durationpb.New(pinFor),
		PrepareTimeout: durationpb.New(s.strategy.deadline), HoldTimeout: durationpb.New(holdFor),
	}
}

// Commit announces the patch of the pod to the node.
func (s *session) commit(i *item) {
	w, t, node := s.state, i.m.visit, i.m.node
	w.mu.Lock()
	if t.committed {
		w.mu.Unlock()
		return
	}
	t.committed = true
	w.mu.Unlock()
	label, answers := s.newLabel(i), i.m.answersOf(w)
	images := answers.all(i.verdict.images)
	change, err := s.change(i, t.uid, answers)
	if err != nil {
		w.mu.Lock()
		t.failed = &failure{failPreparation, err.Error()}
		w.mu.Unlock()
		return
	}
	s.driver.crew.Do(func(ctx context.Context) {
		var since time.Time
		for tries := 0; ; tries++ {
			err := s.driver.stillSo(ctx, i, change, answers)
			var request *opsv1.CommitUpgradeRequest
			if err == nil {
				request, err = s.driver.commitRequest(ctx, w, i.pod, label, t.uid, images)
			}
			var op *opsv1.Operation
			if err == nil {
				op, err = s.driver.nodes.CommitUpgrade(ctx, node, request)
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
			} else if time.Since(since) >= s.strategy.deadline && !tr.final && !tr.stale {
				tr.failure, tr.final = tooLong(i.pod.Name, s.strategy.deadline, err), true
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

// abort tells a node to take back an upgrade. If the node cannot be reached, the upgrade ends there after holdFor. The caller holds the
// mutex of the state.
func (s *session) abort(node controller.Node, t *talk, why string) {
	if t == nil || t.op == nil || t.op.GetFinishTime() != nil || t.op.GetKind() == "Restart" {
		return
	}
	s.takeBack(node, t.uid, why)
}

// memberOf returns what is known of a pod. If that is about another revision, the node is told to take back what it has prepared for it,
// unless the pod was changed for that.
func (s *session) memberOf(pod *corev1.Pod, revision string) *member {
	m, dropped := s.state.memberOf(pod, revision)
	if dropped != nil && !m.stale(pod) && (m.mark == nil || m.mark.Operation != dropped.uid) {
		s.state.mu.Lock()
		defer s.state.mu.Unlock()
		s.abort(m.node, dropped, "something else is wanted of the pod")
	}
	return m
}

// keep forgets all other pods: they do not belong to the rollout any more. Nodes are told to take back what they have prepared for them.
func (s *session) keep(pods map[types.UID]bool) {
	s.state.mu.Lock()
	for uid, m := range s.state.members {
		if t := m.visit; !pods[uid] && t != nil && (m.mark == nil || m.mark.Operation != t.uid) {
			s.abort(m.node, t, "the pod is not the rollout's any more")
		}
	}
	s.state.mu.Unlock()
	s.state.keep(pods)
}

// abortMarked tells the node to take back the upgrade for which this rollout last changed the pod. If kubelet has not begun with it, the
// node would go on waiting for kubelet, and refuse other operations on the container.
func (s *session) abortMarked(m *member, why string) {
	if m.mark != nil && m.mark.Rollout == s.rollout.UID && m.mark.Operation != "" && m.node.Name != "" {
		s.takeBack(m.node, m.mark.Operation, why)
	}
}

func (s *session) takeBack(node controller.Node, uid, why string) {
	s.driver.crew.Do(func(ctx context.Context) {
		for tries := range 5 {
			_, err := s.driver.nodes.AbortUpgrade(ctx, node, uid, why)
			if t := troubleOf(err); err == nil || t.final || t.stale || !pause(ctx, tellPause<<tries) {
				return
			}
		}
	})
}

// Follow follows the operation of a pod that was changed already.
func (s *session) follow(ctx context.Context, i *item) {
	w, m, uid := s.state, i.m, i.m.mark.Operation
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.visit != nil && m.visit.uid == uid {
		return
	}
	m.visit.end()
	t := &talk{uid: uid}
	m.visit = t
	node, err := s.driver.node(ctx, i.pod)
	if err != nil {
		t.asked = true // there is nobody to ask
		return
	}
	m.node, w.nodes[node.Name] = node, node
	s.listen(t, node, i.pod.Name)
}

// listen follows an operation that was begun before. If the node does not know it, or not any more, it has ended.
func (s *session) listen(t *talk, node controller.Node, pod string) {
	c := &conversation{d: s.driver, w: s.state, t: t, node: node, pod: pod, patience: s.strategy.deadline}
	c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
		op, err := s.driver.nodes.GetOperation(ctx, node, t.uid)
		if code(err) == codes.NotFound {
			c.change(func() { t.asked = true })
			return &opsv1.Operation{Uid: t.uid, FinishTime: timestamppb.New(s.now), Phase: opsv1.Phase_PHASE_CANCELLED}, nil
		}
		return op, err
	}
	c.start()
}

// inquire asks the node whether it still restarts containers for another goal: of a rollout that has ended or was deleted, or of an
// earlier revision.
func (s *session) inquire(ctx context.Context, i *item) {
	w, m := s.state, i.m
	uid := m.mark.restartUID(i.pod)
	w.mu.Lock()
	defer w.mu.Unlock()
	if m.restart != nil && m.restart.uid == uid {
		return
	}
	m.restart.end()
	t := &talk{uid: uid, inquires: true}
	m.restart = t
	node, err := s.driver.node(ctx, i.pod)
	if err != nil {
		t.asked = true // there is nobody to ask
		w.wake()
		return
	}
	s.listen(t, node, i.pod.Name)
}

// Restart has the node restart the containers of a pod that keep their images.
func (s *session) restart(ctx context.Context, i *item) {
	w, m := s.state, i.m
	w.mu.Lock()
	defer w.mu.Unlock()
	request := s.restartRequest(ctx, i)
	if m.restart != nil && m.restart.uid == request.GetUid() {
		return
	}
	m.restart.end()
	t := &talk{uid: request.GetUid()}
	m.restart = t
	node, err := s.driver.node(ctx, i.pod)
	if err != nil {
		t.failed = &failure{failUnreachable, err.Error()}
		return
	}
	m.node, w.nodes[node.Name] = node, node
	c := &conversation{d: s.driver, w: w, t: t, node: node, pod: i.pod.Name, patience: s.strategy.deadline}
	c.begin = func(ctx context.Context) (*opsv1.Operation, error) {
		now, err := s.driver.launch(ctx, w, i.pod, "")
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
		op, err := s.driver.nodes.Restart(ctx, node, request)
		if code(err) == codes.AlreadyExists {
			op, err = s.driver.nodes.GetOperation(ctx, node, request.GetUid())
		}
		return op, err
	}
	c.start()
}

func (s *session) restartRequest(ctx context.Context, i *item) *opsv1.RestartRequest {
	request := &opsv1.RestartRequest{Uid: i.m.mark.restartUID(i.pod), Pod: refOf(i.pod), Requester: ownerOf(s.rollout)}
	for _, name := range slices.Sorted(maps.Keys(i.m.mark.Containers)) {
		c, _ := containerOf(i.pod, name)
		old := i.m.mark.Containers[name]
		if c == nil || c.Image != old.Image || old.ID == "" {
			continue
		}
		want := &opsv1.ContainerRestart{Name: name, ExpectedContainerId: old.ID, GracePeriodSeconds: s.strategy.grace}
		want.RunAsNonRoot, want.RunAsUser = controller.RunAs(i.pod, c)
		if c.StartupProbe != nil {
			want.HoldProbes = controller.HoldProbes(c, s.driver.carries(ctx, i.pod))
		}
		if s.strategy.startFirst {
			want.Order, want.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, s.strategy.besideSeconds()
		}
		if c.Lifecycle != nil {
			// A hook that cannot be resolved is left out: kubelet could not run it either.
			want.PreStop, _ = controller.HookOf(c, c.Lifecycle.PreStop, i.pod.Status.PodIP)
			want.PostStart, _ = controller.HookOf(c, c.Lifecycle.PostStart, i.pod.Status.PodIP)
		}
		request.Containers = append(request.Containers, want)
	}
	return request
}

// upgrade returns the UID of the operation that upgrades a pod as it has to be now, and its phase. The UID is empty if no node knows of it.
func (s *session) upgrade(i *item) (uid string, phase opsv1.Phase) {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	if t := i.m.visit; t != nil && t.uid == s.upgradeUID(i) {
		return t.uid, t.op.GetPhase()
	}
	return "", 0
}

// AbortUpgrade tells the node of a pod to take back its upgrade.
func (s *session) abortVisit(m *member, why string) {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	s.abort(m.node, m.visit, why)
}

// withdraw tells the node of a pod to take back what it has prepared, unless the pod was changed for that.
func (s *session) withdraw(m *member, why string) {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	if t := m.visit; t != nil && !t.over && (m.mark == nil || m.mark.Operation != t.uid) {
		s.abort(m.node, t, why)
		t.end()
		m.visit = nil
		m.round++ // what was taken back stays so
	}
}

// trouble says what the API server has failed with several times in a row; empty if there is nothing.
func (s *session) trouble(items []*item) string {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	for _, i := range items {
		all := []apiTrouble{i.m.api}
		if t := i.m.visit; t != nil && !t.over && t.failed == nil {
			all = append(all, t.api)
		}
		for _, t := range all {
			if t.count >= controller.APITries {
				return fmt.Sprintf("pod %s cannot be changed, %d tries have failed since %s: %s", i.pod.Name, t.count, t.since.UTC().Format(time.RFC3339), t.text)
			}
		}
	}
	return ""
}

// wrongSecrets says which pull secrets of the pods cannot be used, and why.
func (s *session) wrongSecrets() []string {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	var wrong []string
	for _, name := range slices.Sorted(maps.Keys(s.state.keys)) {
		wrong = append(wrong, s.state.keys[name].ring.Wrong...)
	}
	return wrong
}

// finished returns the operations that have changed a pod and have succeeded.
func (s *session) finished(m *member) []*opsv1.Operation {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	var done []*opsv1.Operation
	for _, t := range []*talk{m.visit, m.restart} {
		if t != nil && !t.inquires && t.op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED && t.op.GetFinishTime() != nil {
			done = append(done, t.op)
		}
	}
	return done
}
