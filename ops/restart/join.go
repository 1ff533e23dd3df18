// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package restart

import (
	"context"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/imageupdate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
	"github.com/cri-proxy/cri-proxy/ops/store"
)

// join passes on to a restart what kubelet does in its slot. Kubelet does not know that the
// container is being stopped: when a probe fails meanwhile, as that of an application that drains,
// it stops the container too. What it wants by that is what the restart does already, so its stop
// joins: it is answered once the successor is there. A pod that goes away is told apart.
type join struct {
	d *driver

	creates view.Creations
	shown   chan struct{} // closed when kubelet has been shown the successor
	over    chan struct{} // closed when the restart answers no more
	sooner  chan struct{} // closed when kubelet has had the incumbent stopped within less than its grace

	mu        sync.Mutex // guards all following fields
	listening bool
	stops     int       // stops of kubelet's of which it is not decided whether they join
	joined    bool      // one has
	by        time.Time // when the grace of the stop under way ends
	hurried   bool      // sooner is closed
	left      bool      // the restart goes on in another process
}

var _ view.Driver = (*join)(nil)

func newJoin(d *driver) *join {
	return &join{d: d, creates: make(view.Creations), shown: make(chan struct{}), over: make(chan struct{}),
		sooner: make(chan struct{})}
}

// listen lets kubelet's stops join from now on. by is when the incumbent's grace ends.
func (j *join) listen(by time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.listening, j.by = true, by
}

// show says that kubelet has been shown the successor. It reports whether a stop of kubelet's has
// joined, or is about to; so is one of which the view knows, and that has not come here yet. If
// none has, none will.
func (j *join) show() bool {
	stopping := j.d.c.Claim.Stopping()
	j.mu.Lock()
	defer j.mu.Unlock()
	close(j.shown)
	j.listening = j.joined || j.stops > 0 || stopping
	return j.listening
}

func (j *join) isShown() bool {
	select {
	case <-j.shown:
		return true
	default:
		return false
	}
}

// end says that the restart answers no more; left that another process goes on with it.
func (j *join) end(left bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.left = left
	close(j.over)
}

// Stop implements [view.Driver].
func (j *join) Stop(ctx context.Context, grace int64) (bool, error) {
	if !j.begin() {
		return false, nil
	}
	why := j.d.refusalToJoin(ctx)
	j.decide(why == "")
	if why != "" {
		j.d.c.Log.WithField("reason", why).Info("kubelet stops the container, and the restart does not go on")
		return false, nil
	}
	j.d.joined()
	j.hurry(ctx, time.Duration(grace)*time.Second)
	select {
	case <-j.shown:
		return true, nil
	case <-j.over:
	case <-ctx.Done(): // the restart goes on
		return true, ctx.Err()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.isShown():
		return true, nil
	case j.left:
		return true, status.Error(codes.Unavailable,
			"cri-proxy ends; its next process goes on with the restart of the container")
	default: // it has failed: kubelet's own stop does no harm
		return false, nil
	}
}

// begin reports whether stops may join.
func (j *join) begin() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.listening {
		j.stops++
	}
	return j.listening
}

func (j *join) decide(joined bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stops--
	j.joined = j.joined || joined
}

func (j *join) hasJoined() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.joined
}

// hurry stops the incumbent within the grace if that ends before the one under way: as with the
// runtime, the shorter one wins.
func (j *join) hurry(ctx context.Context, grace time.Duration) {
	by := time.Now().Add(grace)
	j.mu.Lock()
	less := by.Before(j.by) && !j.isShown()
	if less {
		j.by = by
	}
	j.mu.Unlock()
	if !less {
		return
	}
	j.d.c.Old.Hurry(ctx, grace)
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.hurried {
		j.hurried = true
		close(j.sooner)
	}
}

// Create implements [view.Driver]. Kubelet creates in the slot after its stop has joined;
// whoever else does waits for the restart to end.
func (j *join) Create(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, bool) {
	if !j.hasJoined() {
		return "", true
	}
	return j.creates.Ask(ctx, req, j.over)
}

// joins lets kubelet's stops join from the moment on at which the restart is bound to stop the
// container, whichever process has come to that. The caller holds the slot.
func (d *driver) joins() {
	rec := d.c.Record()
	if rec.Joinable() {
		d.join.listen(rec.StopBy)
	}
	if rec.Joined {
		d.join.mu.Lock()
		d.join.joined = true
		d.join.mu.Unlock()
	}
	if rec.Step == store.StepReveal {
		d.join.show()
	}
	d.c.Claim.Drive(d.join)
}

// refusalToJoin says why a stop of the incumbent does not join the restart, as far as kubelet
// tells; empty if it may.
func (d *driver) refusalToJoin(ctx context.Context) string {
	return d.c.AskKubelet(ctx, func(ctx context.Context, pod *podsapi.Pod) string {
		name, rec := d.c.Spec.GetName(), d.c.Record()
		request, err := d.c.Node.RequestOf(ctx, rec.Incumbent, rec.Sandbox)
		hash := request.GetConfig().GetAnnotations()[criclone.AnnotationHash]
		if err == nil && hash != "" && pod.Images[name] != "" && hash != criclone.KubeletHash(name, pod.Images[name]) {
			// Kubelet makes a container of another image. The successor would run in between, for
			// nothing.
			return "the pod's spec has another image"
		}
		return ""
	})
}

// joined notes that a stop of kubelet's has joined the restart.
func (d *driver) joined() {
	if d.c.Record().Joined {
		return
	}
	_, err := d.c.Handle.Write(func(c *store.Container, op *opsv1.ContainerOperation) {
		if c.Joined {
			return
		}
		c.Joined = true
		op.Warnings = append(op.Warnings, JoinedWarning)
	})
	if err != nil {
		d.c.Log.WithError(err).Warn("not written that a stop of kubelet's has joined the restart")
	}
	d.c.Log.Info("kubelet stops the container too: its stop joins the restart")
}

// JoinedWarning is the warning of a restart that a stop of kubelet's has joined.
const JoinedWarning = "kubelet stopped the old container as well while it was being stopped, because of a " +
	"failed probe perhaps: " +
	"its stop became part of the restart"

const (
	// RecreateTimeout is how long kubelet may take from the answer to a stop that has joined to its
	// CreateContainer. Both are of one sync of the pod, with nothing in between but a look at the
	// images, for which kubelet asks a registry where the pull policy is Always: less than a second
	// mostly. With restartPolicy Never none comes. Where kubelet's Pods API tells that its next
	// sync has begun there is nothing to wait for. A CreateContainer that comes later finds its
	// name taken in the runtime, and kubelet's next sync finds the successor running
	// (kuberuntime_manager.go computePodActions).
	RecreateTimeout = 30 * time.Second
	// RecreatePoll is how often that is asked.
	RecreatePoll = time.Second
)

// awaitRecreation answers the CreateContainer that follows a stop which has joined, if one does.
func (d *driver) awaitRecreation(ctx context.Context) error {
	timeout := time.NewTimer(RecreateTimeout)
	defer timeout.Stop()
	look := time.NewTicker(RecreatePoll)
	defer look.Stop()
	for {
		select {
		case q := <-d.join.creates:
			return d.recreate(ctx, q)
		case <-look.C:
			if d.isKnown(ctx) {
				return nil
			}
		case <-d.c.Claim.Yielded():
			return d.c.Interrupted()
		case <-timeout.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// isKnown reports whether kubelet tells that it goes by the successor: that is so from the
// beginning of its next sync of the pod.
func (d *driver) isKnown(ctx context.Context) bool {
	if d.c.Node.Pods == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, podsapi.Timeout)
	defer cancel()
	pod, err := d.c.Node.Pods.Pod(ctx, d.c.Op.Pod().GetUid())
	if err != nil {
		return false
	}
	_, id, _ := strings.Cut(pod.Running[d.c.Spec.GetName()], "://")
	return id == d.c.Successor()
}

// recreate answers kubelet's CreateContainer with the successor, if that is what it asks for.
func (d *driver) recreate(ctx context.Context, q *view.Creation) error {
	if q.Request.GetConfig().GetMetadata().GetAttempt() > d.c.Status().GetAttempt() {
		return nil // kubelet knows the successor, which has ended or been stopped since
	}
	asked := d.c.Node.Overridden(ctx, d.c.Slot(), q.Request)
	differing := d.c.Stager.Differs(ctx, asked)
	if len(differing) == 0 {
		d.c.Stager.MatchResources(ctx, asked)
		q.Adopt(d.c.Successor())
		return nil
	}
	d.c.Log.WithField("differing", differing).
		Warn("kubelet asks for another container than the restart has made: it makes its own")
	d.c.Stager.StopWithin(ctx, d.c.Successor(), d.c.Old.LateGrace(ctx))
	if err := d.c.Stager.Remove(ctx, d.c.Successor()); err != nil {
		return operation.Failf(opsv1.ReasonRuntimeError, "%v", err)
	}
	d.c.Warn("kubelet made the container once more, because it asked for another one than there was: %s",
		strings.Join(differing, ", "))
	d.c.SetMethod(opsv1.MethodKubelet)
	d.c.Revealer.HoldNext(ctx, imageupdate.AdoptTimeout)
	return nil
}
