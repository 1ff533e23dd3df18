// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors"
)

const (
	// callTimeout bounds one call to the runtime: kubelet's own runtimeRequestTimeout.
	callTimeout = 2 * time.Minute
	// hidePatience bounds the wait for answers that are on their way to kubelet undecoded. Lists take
	// milliseconds; if one takes this long the runtime is in no state for a restart.
	hidePatience = 10 * time.Second
	// minGrace is kubelet's minimumGracePeriodInSeconds (kuberuntime_manager.go).
	minGrace = 2 * time.Second
	// maxTries bounds the tries of a call that answers Unavailable although the runtime answers others:
	// about 20 s together. A runtime that is away altogether is waited for without bound.
	maxTries = 12
	// defaultGrace is the API's default terminationGracePeriodSeconds, for pods that tell none.
	defaultGrace = 30 * time.Second
)

// Reasons of containers that did not succeed.
const (
	ReasonExpectedIDDiffers = "ExpectedIDDiffers"
	ReasonNotRunning        = "ContainerNotRunning"
	ReasonNotFound          = "NotFound"
	ReasonPodStopping       = "PodStopping"
	ReasonTakenBack         = "TakenBackByKubelet"
	ReasonCancelled         = "Cancelled"
	ReasonSkipped           = "EarlierContainerFailed"
	ReasonCreateFailed      = "CreateFailed"
	ReasonStopFailed        = "StopFailed"
	ReasonStartFailed       = "StartFailed"
	ReasonPostStartFailed   = "PostStartHookFailed"
	ReasonRuntime           = "RuntimeError"
	ReasonJournal           = "JournalError"
)

// outcome ends the restart of a container. It is an error, except that it also
// carries success.
type outcome struct {
	phase   opsv1.Phase
	reason  string
	message string
}

func (o *outcome) Error() string { return o.message }

func failf(reason, format string, args ...any) *outcome {
	return &outcome{phase: opsv1.Phase_PHASE_FAILED, reason: reason, message: fmt.Sprintf(format, args...)}
}

// execute runs an operation to its end, or until ctx ends.
func (e *Engine) execute(ctx context.Context, o *operation) {
	req := o.req
	var wg sync.WaitGroup
	failed := false
	for i := range req.GetContainers() {
		r := e.newRestart(o, i)
		if !req.GetOrdered() {
			wg.Go(func() { r.run(ctx) })
			continue
		}
		if failed {
			r.end(&outcome{phase: opsv1.Phase_PHASE_CANCELLED, reason: ReasonSkipped, message: "not restarted because an earlier container failed"})
			continue
		}
		failed = !r.run(ctx)
		if ctx.Err() != nil {
			return
		}
	}
	wg.Wait()
	e.finish(o)
}

// finish ends the operation if all its containers have ended.
func (e *Engine) finish(o *operation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	phase := opsv1.Phase_PHASE_SUCCEEDED
	var messages []string
	for i, c := range o.op.GetContainers() {
		if o.containers[i].Step != stepDone {
			return // shutting down
		}
		phase = max(phase, c.GetPhase())
		if c.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			messages = append(messages, fmt.Sprintf("%s: %s", c.GetName(), c.GetMessage()))
		}
	}
	for _, c := range o.op.GetContainers() {
		if c.GetPhase() == opsv1.Phase_PHASE_FAILED {
			phase = opsv1.Phase_PHASE_FAILED // says more than that others were cancelled
		}
	}
	o.op.Phase = phase
	o.op.FinishTime = timestamppb.Now()
	if len(messages) > 0 {
		o.op.Message = strings.Join(messages, "; ")
	}
	if err := e.saveLocked(o); err != nil {
		// It is finished all the same; after a restart it would be found done and finished again.
		e.log.WithField("op", o.op.GetUid()).WithError(err).Error("end of operation not written")
	}
	e.metrics.finished(o.op)
	e.log.WithFields(logrus.Fields{"op": o.op.GetUid(), "pod": podName(o.op.GetPod()), "phase": phase, "requester": o.op.GetRequester()}).Info("operation finished")
	o.notifyLocked()
}

// restart is the restart of one container: a state machine over [step].
type restart struct {
	*Engine
	o     *operation
	i     int
	want  *opsv1.ContainerRestart
	claim *interceptors.Claim
	log   logrus.FieldLogger

	incumbent *runtimeapi.ContainerStatus
	request   *runtimeapi.CreateContainerRequest // of the incumbent
	applied   *runtimeapi.LinuxContainerResources
}

func (e *Engine) newRestart(o *operation, i int) *restart {
	o.mu.Lock()
	defer o.mu.Unlock()
	return &restart{
		Engine: e, o: o, i: i, want: o.req.GetContainers()[i], claim: o.claims[i],
		log: e.log.WithFields(logrus.Fields{"op": o.op.GetUid(), "pod": podName(o.op.GetPod()), "container": o.req.GetContainers()[i].GetName()}),
	}
}

func (r *restart) rec() containerRecord {
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	return r.o.containers[r.i]
}

// write changes the journal's record and the operation's public state in one
// durable step.
func (r *restart) write(f func(rec *containerRecord, c *opsv1.ContainerOperation)) error {
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	before := r.o.containers[r.i]
	f(&r.o.containers[r.i], r.o.op.GetContainers()[r.i])
	if err := r.saveLocked(r.o); err != nil {
		r.o.containers[r.i] = before
		return failf(ReasonJournal, "%v", err)
	}
	r.o.notifyLocked()
	failpoint("restart." + string(r.o.containers[r.i].Step))
	return nil
}

// show changes the public state only.
func (r *restart) show(f func(c *opsv1.ContainerOperation)) {
	r.o.change(func(op *opsv1.Operation) { f(op.GetContainers()[r.i]) })
}

func (r *restart) warn(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	r.log.Warn(msg)
	r.show(func(c *opsv1.ContainerOperation) { c.Warnings = append(c.Warnings, msg) })
}

// run returns whether the container was restarted. When ctx ends it returns early and
// leaves the rest to the next process.
func (r *restart) run(ctx context.Context) bool {
	if r.rec().Step == stepDone {
		return r.o.snapshot().GetContainers()[r.i].GetPhase() == opsv1.Phase_PHASE_SUCCEEDED
	}
	err := r.drive(ctx)
	var out *outcome
	switch {
	case err == nil:
		out = &outcome{phase: opsv1.Phase_PHASE_SUCCEEDED}
	case errors.As(err, &out):
	case ctx.Err() != nil:
		return false
	default:
		out = failf(ReasonRuntime, "%v", err)
	}
	if ctx.Err() != nil && out.phase != opsv1.Phase_PHASE_SUCCEEDED && r.rec().Step != stepUndo {
		// The failure may be that of a call cut off by the shutdown.
		return false
	}
	if out.phase != opsv1.Phase_PHASE_SUCCEEDED && !r.undo(ctx, out) {
		return false
	}
	r.end(out)
	if r.claim != nil {
		r.claim.Release()
	}
	return out.phase == opsv1.Phase_PHASE_SUCCEEDED
}

// end writes how it ended.
func (r *restart) end(out *outcome) {
	err := r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step = stepDone
		c.Phase, c.Reason, c.Message = out.phase, out.reason, out.message
	})
	if err != nil {
		r.log.WithError(err).Error("end of restart not written")
		r.o.mu.Lock()
		r.o.containers[r.i].Step = stepDone
		r.o.mu.Unlock()
	}
	log := r.log.WithField("phase", out.phase)
	if out.reason != "" {
		log = log.WithFields(logrus.Fields{"reason": out.reason, "message": out.message})
	}
	log.Info("container restart ended")
}

// drive takes the container through the steps. It returns nil on success, an
// [outcome], or the error of a call that was cut off.
func (r *restart) drive(ctx context.Context) error {
	if r.claim == nil {
		if err := r.takeSlot(ctx); err != nil {
			return err
		}
	} else if err := r.awaitRuntime(ctx); err != nil { // resumed from the journal
		return err
	}
	if rec := r.rec(); rec.Step == stepUndo {
		c := r.container()
		out := &outcome{phase: opsv1.Phase_PHASE_FAILED, reason: c.GetReason(), message: c.GetMessage()}
		if out.reason == ReasonCancelled {
			out.phase = opsv1.Phase_PHASE_CANCELLED
		}
		return out
	}
	if r.rec().Step == stepStage { // resumed: the successor may or may not exist; nothing was stopped
		if err := r.removeStaged(ctx); err != nil {
			return err
		}
		if err := r.write(func(rec *containerRecord, _ *opsv1.ContainerOperation) { rec.Step = stepNone }); err != nil {
			return err
		}
	}
	for {
		var err error
		switch s := r.rec().Step; s {
		case stepNone:
			err = r.stage(ctx)
		case stepStaged:
			err = r.beforeStop(ctx)
		case stepStop:
			err = r.swap(ctx)
		case stepStarted:
			return r.afterStart(ctx)
		case stepReveal: // resumed: kubelet has been shown both
			if c := r.container(); c.GetReason() != "" {
				return failf(c.GetReason(), "%s", c.GetMessage())
			}
			r.measure(ctx, r.rec())
			return nil
		default:
			return failf(ReasonJournal, "the journal has the unknown step %q", s)
		}
		if err != nil {
			return err
		}
	}
}

func (r *restart) container() *opsv1.ContainerOperation {
	return r.o.snapshot().GetContainers()[r.i]
}

// takeSlot waits for the operation's turn on the slot.
func (r *restart) takeSlot(ctx context.Context) error {
	waiting, end := endWith(ctx, r.o.cancelled)
	defer end()
	claim, err := r.view.Claim(waiting, interceptors.Slot{PodUID: r.o.op.GetPod().GetUid(), Container: r.want.GetName()})
	switch {
	case err == nil:
		r.claim = claim
		return nil
	case ctx.Err() == nil:
		return r.cancelledOutcome()
	default:
		return err
	}
}

// endWith returns ctx, which also ends when c is closed. The caller must call end.
func endWith(ctx context.Context, c <-chan struct{}) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() { // ends with ctx
		select {
		case <-c:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func (r *restart) cancelledOutcome() *outcome {
	msg := r.o.snapshot().GetMessage()
	if msg == "" {
		msg = "cancelled"
	}
	return &outcome{phase: opsv1.Phase_PHASE_CANCELLED, reason: ReasonCancelled, message: msg}
}

// interrupted returns an outcome if the operation was cancelled or kubelet took the slot back.
func (r *restart) interrupted() error {
	if y := r.claim.YieldedTo(); y != nil {
		return failf(ReasonTakenBack, "kubelet called %s in the middle of the restart and is in charge now", y.Method[strings.LastIndexByte(y.Method, '/')+1:])
	}
	select {
	case <-r.o.cancelled: // then it has not been committed, and never is
		return r.cancelledOutcome()
	default:
		return nil
	}
}

// stage resolves the slot, checks the preconditions and creates the successor, hidden.
func (r *restart) stage(ctx context.Context) error {
	r.show(func(c *opsv1.ContainerOperation) { c.Phase = opsv1.Phase_PHASE_STAGING })
	if err := r.awaitRuntime(ctx); err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	found, err := r.resolve(call, r.o.op.GetPod(), r.want, r.o.req.GetForce())
	if err != nil {
		var out *outcome
		if errors.As(err, &out) {
			return out
		}
		return fmt.Errorf("finding the container: %w", err)
	}
	r.claim.Bind(found.sandbox, found.incumbent)
	if err := r.checkTakenBack(); err != nil {
		return err
	}
	token := r.newToken()
	err = r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		*rec = containerRecord{Step: stepStage, Sandbox: found.sandbox, Incumbent: found.incumbent, Token: token}
		c.IncumbentId, c.Attempt = found.incumbent, found.attempt
	})
	if err != nil {
		return err
	}
	hide, cancelHide := context.WithTimeout(ctx, hidePatience)
	defer cancelHide()
	if err := r.claim.Hide(hide, token); err != nil {
		return failf(ReasonRuntime, "the runtime takes more than %s to answer a list: restart not begun", hidePatience)
	}
	id, err := r.create(call, token)
	if err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	return r.write(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step, rec.Successor = stepStaged, id
		c.SuccessorId, c.Phase = id, opsv1.Phase_PHASE_STOPPING
	})
}

// checkTakenBack refuses a container that kubelet is stopping already, or a pod on its way out.
func (r *restart) checkTakenBack() error {
	if r.claim.Stopping() {
		return failf(ReasonPodStopping, "kubelet is stopping container %q already", r.want.GetName())
	}
	return r.interrupted()
}

// create creates the next attempt of the incumbent under the token.
func (r *restart) create(ctx context.Context, token string) (string, error) {
	if err := r.load(ctx); err != nil {
		return "", err
	}
	if newer := r.records.resources(r.rec().Incumbent); newer != nil {
		r.applied = newer
	}
	req, err := cloneFor(r.request, r.applied, r.container().GetAttempt(), token)
	if err != nil {
		return "", failf(ReasonCreateFailed, "%v", err)
	}
	if err := makeTerminationFile(req.GetConfig()); err != nil {
		return "", failf(ReasonCreateFailed, "%v", err)
	}
	// Not bound to ctx: a cancelled CreateContainer leaves a container behind with its name taken.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	resp, err := r.rt.CreateContainer(call, req)
	if err != nil {
		if status.Code(err) == codes.DeadlineExceeded {
			// The runtime may be just about to finish it; until it is gone the token keeps it hidden.
			r.removeLate(ctx)
		}
		return "", failf(ReasonCreateFailed, "creating the new container: %v", status.Convert(err).Message())
	}
	raw, err := proto.Marshal(req)
	if err == nil {
		r.records.Created(resp.GetContainerId(), raw)
	}
	r.claim.Staged(resp.GetContainerId())
	failpoint("restart.created")
	r.catchUp(ctx, resp.GetContainerId())
	return resp.GetContainerId(), nil
}

// removeLate removes the container of a create that was cut off, if it comes about within lateCreate.
func (r *restart) removeLate(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lateCreate)
	defer cancel()
	for sleep(ctx, 500*time.Millisecond) == nil {
		if id, err := r.findStaged(ctx, r.rec()); err == nil && id != "" {
			return // undo removes it
		}
	}
}

// catchUp applies to the successor what kubelet has set on the incumbent while the
// successor was being created. From Staged on the director applies updates to both.
func (r *restart) catchUp(ctx context.Context, id string) {
	newer := r.records.resources(r.rec().Incumbent)
	if newer == nil || proto.Equal(newer, r.applied) {
		return
	}
	r.applied = newer
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if _, err := r.rt.UpdateContainerResources(call, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: newer}); err != nil {
		r.log.WithError(err).Warn("staged container did not take the new resources")
		return
	}
	if b, err := proto.Marshal(newer); err == nil {
		r.records.Updated(id, b)
	}
}

// load reads the incumbent and the request that made it, once.
func (r *restart) load(ctx context.Context) error {
	if r.request != nil {
		return nil
	}
	rec := r.rec()
	st, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if err != nil {
		return failf(ReasonRuntime, "reading container %s: %v", rec.Incumbent, status.Convert(err).Message())
	}
	r.incumbent = st.GetStatus()
	r.request, r.applied, err = r.requestOf(ctx, rec.Incumbent, rec.Sandbox)
	if err != nil {
		return failf(ReasonCreateFailed, "%v", err)
	}
	return nil
}

// beforeStop masks the incumbent and runs its preStop hook.
func (r *restart) beforeStop(ctx context.Context) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	rec := r.rec()
	resumed := !rec.StopBy.IsZero() // it is written after the commit
	r.claim.Mask()
	if !resumed {
		// From the mask on, an exit of the incumbent is ours to handle; one from before is kubelet's.
		st, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
		if err != nil {
			return failf(ReasonRuntime, "reading container %s: %v", rec.Incumbent, status.Convert(err).Message())
		}
		if st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return failf(ReasonNotRunning, "container %q stopped by itself (exit code %d) before the restart began; kubelet handles it", r.want.GetName(), st.GetStatus().GetExitCode())
		}
		if err := r.interrupted(); err != nil {
			return err
		}
		if !r.o.commit() {
			return r.cancelledOutcome()
		}
	}
	grace := r.grace()
	if rec.StopBy.IsZero() {
		rec.StopBy = time.Now().Add(grace)
		if err := r.write(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.StopBy = rec.StopBy }); err != nil {
			return err
		}
	}
	r.preStop(ctx, grace, rec.StopBy)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	return r.write(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.Step = stepStop })
}

// grace is what preStop and stop may take together, before the floor for the stop.
func (r *restart) grace() time.Duration {
	if r.want.GracePeriodSeconds != nil {
		return time.Duration(r.want.GetGracePeriodSeconds()) * time.Second
	}
	for _, a := range []map[string]string{r.incumbent.GetAnnotations(), r.request.GetConfig().GetAnnotations()} {
		if s, err := strconv.ParseInt(a[annotationTerminationGrace], 10, 32); err == nil && s >= 0 {
			return time.Duration(s) * time.Second
		}
	}
	return defaultGrace
}

// preStop runs the hook within the grace. As in kubelet, its failure does not
// keep the container from being stopped, and no grace means no hook.
func (r *restart) preStop(ctx context.Context, grace time.Duration, by time.Time) {
	hook := r.want.GetPreStop()
	if hook == nil {
		var err error
		if hook, err = recordedPreStop(r.incumbent.GetAnnotations()); err != nil {
			r.warn("preStop: %v", err)
		}
	}
	if hook == nil || grace <= 0 {
		return
	}
	ctx, cancel := context.WithDeadline(ctx, by)
	defer cancel()
	ctx, end := endWith(ctx, r.claim.Yielded())
	defer end()
	rec := r.rec()
	if err := r.runHook(ctx, hook, rec.Incumbent, rec.Sandbox); err != nil && ctx.Err() == nil {
		r.warn("preStop hook failed: %v", err)
	} else if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		r.warn("preStop hook did not end within the grace period of %s", grace)
	}
}

// swap stops the incumbent and starts the successor. It is the only part that the
// application notices, so nothing in it waits for the disk.
func (r *restart) swap(ctx context.Context) error {
	if err := r.stop(ctx); err != nil {
		return err
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	failpoint("restart.stopped")
	if err := r.start(ctx); err != nil {
		return err
	}
	failpoint("restart.running")
	r.note(func(rec *containerRecord, c *opsv1.ContainerOperation) {
		rec.Step = stepStarted
		c.Phase = opsv1.Phase_PHASE_STARTING
		c.SuccessorId = rec.Successor
	})
	return nil
}

// stop stops the incumbent within what is left of its grace.
func (r *restart) stop(ctx context.Context) error {
	rec := r.rec()
	for try := 1; ; try++ {
		left := max(time.Until(rec.StopBy), minGrace)
		seconds := int64((left + time.Second - 1) / time.Second)
		// Not bound to ctx: a cancelled StopContainer never kills.
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), left+callTimeout)
		_, err := r.rt.StopContainer(call, &runtimeapi.StopContainerRequest{ContainerId: rec.Incumbent, Timeout: seconds})
		cancel()
		if err == nil {
			return nil
		}
		if status.Code(err) != codes.Unavailable || try == maxTries {
			return failf(ReasonStopFailed, "stopping the container: %v", status.Convert(err).Message())
		}
		if err := r.awaitReturn(ctx, try); err != nil {
			return err
		}
	}
}

// awaitReturn waits until the runtime answers again after a call that it did not answer; longer
// each time, because a runtime that does answer may be without the container's shim.
func (r *restart) awaitReturn(ctx context.Context, try int) error {
	if err := r.awaitRuntime(ctx); err != nil {
		return err
	}
	return sleep(ctx, min(10*time.Millisecond<<try, 5*time.Second))
}

// start starts the successor; once, from a fresh stage, if that fails.
func (r *restart) start(ctx context.Context) error {
	for {
		rec := r.rec()
		if rec.Successor == "" {
			id, err := r.findStaged(ctx, rec)
			if err != nil {
				return err
			}
			if id == "" {
				if id, err = r.create(ctx, rec.Token); err != nil {
					return err
				}
			}
			r.o.mu.Lock()
			r.o.containers[r.i].Successor = id // on disk with the next step; until then the token finds it
			r.o.mu.Unlock()
			r.claim.Staged(id)
			rec.Successor = id
		}
		err := r.startOnce(ctx, rec.Successor)
		if err == nil {
			return nil
		}
		var out *outcome
		if !errors.As(err, &out) || rec.Retried {
			return err
		}
		r.log.WithError(err).Warn("the new container did not start; trying once more from a fresh one")
		token := r.newToken()
		if err := r.removeContainer(ctx, rec.Successor); err != nil {
			return err
		}
		r.claim.HideNow(token)
		r.claim.Staged("")
		err = r.write(func(c *containerRecord, op *opsv1.ContainerOperation) {
			c.Token, c.Successor, c.Retried = token, "", true
			op.Warnings = append(op.Warnings, out.message)
		})
		if err != nil {
			return err
		}
	}
}

// startOnce starts the container, whatever state a crash or a runtime restart left it in.
func (r *restart) startOnce(ctx context.Context, id string) error {
	for try := 1; ; try++ {
		// Not bound to ctx: a cancelled StartContainer destroys the container.
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		_, err := r.rt.StartContainer(call, &runtimeapi.StartContainerRequest{ContainerId: id})
		cancel()
		if err == nil {
			return nil
		}
		again := status.Code(err) == codes.Unavailable && try < maxTries
		if again {
			if err := r.awaitReturn(ctx, try); err != nil {
				return err
			}
		}
		st, serr := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if serr != nil {
			if again && status.Code(serr) == codes.Unavailable {
				continue
			}
			return failf(ReasonStartFailed, "starting the new container: %v", status.Convert(err).Message())
		}
		switch s := st.GetStatus(); {
		case s.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING:
			return nil // it had been started before
		case s.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED && s.GetReason() != startError && s.GetStartedAt() != 0:
			return nil // it had been started before, and has ended: kubelet's policy decides
		case s.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED && again:
			continue
		default:
			return failf(ReasonStartFailed, "starting the new container: %v", status.Convert(err).Message())
		}
	}
}

// startError is containerd's reason for a container whose start failed
// (internal/cri/server/container_start.go errorStartReason).
const startError = "StartError"

// afterStart runs postStart and reveals.
func (r *restart) afterStart(ctx context.Context) error {
	rec := r.rec()
	r.logLink(ctx, rec.Successor)
	if hook := r.want.GetPostStart(); hook != nil && rec.PostStarted { // resumed
		r.warn("cri-proxy was restarted while the postStart hook ran: how it ended is not known, and it is not run again")
	} else if hook != nil {
		r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.PostStarted = true })
		if err := r.postStart(ctx, hook, rec); err != nil {
			return err
		}
	}
	if err := r.interrupted(); err != nil {
		return err
	}
	r.note(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step = stepReveal
		op.Phase = opsv1.Phase_PHASE_REVEALING
	})
	if !r.claim.TryReveal() {
		return r.interrupted()
	}
	failpoint("restart.revealed")
	r.measure(ctx, rec)
	return nil
}

// note is write for the time after the swap: the successor serves, and a journal that cannot
// be written is no reason to take it away. The next process would resume from an earlier step,
// which finds the successor running.
func (r *restart) note(f func(rec *containerRecord, c *opsv1.ContainerOperation)) {
	if err := r.write(f); err != nil {
		r.log.WithError(err).Error("step not written")
		r.o.mu.Lock()
		defer r.o.mu.Unlock()
		f(&r.o.containers[r.i], r.o.op.GetContainers()[r.i])
		r.o.notifyLocked()
	}
}

// postStart runs the hook. As in kubelet, the container is not shown before it has
// ended, and is stopped when it fails (kuberuntime_container.go startContainer).
func (r *restart) postStart(ctx context.Context, hook *opsv1.Hook, rec containerRecord) error {
	call, end := endWith(ctx, r.claim.Yielded())
	defer end()
	err := r.runHook(call, hook, rec.Successor, rec.Sandbox)
	if err == nil || call.Err() != nil {
		return ctx.Err()
	}
	return failf(ReasonPostStartFailed, "postStart hook failed and the new container was stopped: %v", err)
}

// measure fills in what the runtime reports of the swap.
func (r *restart) measure(ctx context.Context, rec containerRecord) {
	before, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Incumbent})
	if err != nil {
		return
	}
	after, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: rec.Successor})
	if err != nil {
		return
	}
	stopped, started := time.Unix(0, before.GetStatus().GetFinishedAt()), time.Unix(0, after.GetStatus().GetStartedAt())
	r.show(func(c *opsv1.ContainerOperation) {
		c.ExitCode = before.GetStatus().GetExitCode()
		c.StopTime, c.StartTime = timestamppb.New(stopped), timestamppb.New(started)
		c.Gap = durationpb.New(started.Sub(stopped))
	})
	r.metrics.gap.Observe(started.Sub(stopped).Seconds())
}

// undo takes back what is hidden, so that kubelet's policy is in charge of what is left. It
// returns false if ctx ended before that was possible.
func (r *restart) undo(ctx context.Context, out *outcome) bool {
	rec := r.rec()
	if r.claim == nil || rec.Step == stepNone || rec.Step == stepDone {
		return true
	}
	if rec.Step == stepReveal && r.container().GetReason() != "" {
		return true // resumed: shown already
	}
	r.note(func(c *containerRecord, op *opsv1.ContainerOperation) {
		c.Step = stepUndo
		op.Reason, op.Message = out.reason, out.message
	})
	if out.reason == ReasonStartFailed || out.reason == ReasonPostStartFailed {
		// Kubelet gets to see the attempt that failed, and why.
		if out.reason == ReasonPostStartFailed {
			r.stopSuccessor(ctx, rec.Successor)
		}
		r.note(func(c *containerRecord, _ *opsv1.ContainerOperation) { c.Step = stepReveal })
		r.claim.Reveal()
		return true
	}
	wait := 200 * time.Millisecond
	for {
		if rec.Step != stepStage && rec.Step != stepStaged { // it may run: ask it to stop
			r.stopSuccessor(ctx, rec.Successor)
		}
		err := r.removeStaged(ctx)
		if err == nil {
			r.claim.Discard()
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		r.log.WithError(err).Warn("staged container not removed; trying again")
		if sleep(ctx, wait) != nil {
			return false
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// stopSuccessor stops a successor that may have been started, within the grace of
// whoever took the slot back.
func (r *restart) stopSuccessor(ctx context.Context, id string) {
	if id == "" {
		return
	}
	grace := minGrace
	if y := r.claim.YieldedTo(); y != nil {
		grace = max(grace, time.Duration(y.Grace)*time.Second)
	} else if r.incumbent != nil && r.request != nil {
		grace = max(grace, r.grace())
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+callTimeout)
	defer cancel()
	if _, err := r.rt.StopContainer(call, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: int64(grace / time.Second)}); err != nil {
		r.log.WithError(err).Warn("new container not stopped")
	}
}

// removeStaged removes every container that carries the token.
func (r *restart) removeStaged(ctx context.Context) error {
	rec := r.rec()
	id, err := r.findStaged(ctx, rec)
	if err != nil || id == "" {
		return err
	}
	return r.removeContainer(ctx, id)
}

func (r *restart) removeContainer(ctx context.Context, id string) error {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if _, err := r.rt.RemoveContainer(call, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("removing container %s: %w", id, err)
	}
	r.records.Removed(id)
	return nil
}

// findStaged returns the container that carries the token, or "".
func (r *restart) findStaged(ctx context.Context, rec containerRecord) (string, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := r.rt.ListContainers(call, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: rec.Sandbox}})
	if err != nil {
		return "", fmt.Errorf("listing containers: %w", err)
	}
	for _, c := range list.GetContainers() {
		if c.GetAnnotations()[interceptors.StagedAnnotation] == rec.Token {
			return c.GetId(), nil
		}
	}
	return "", nil
}
