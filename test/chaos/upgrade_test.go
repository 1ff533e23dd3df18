// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/chaos/invariant"
)

// backAfter is how long a pod may take to get ready with the image that never does, in seconds. A
// kubelet whose calls failed when the proxy was restarted for the case looks at the pod again only
// after its back-off of some 15 s.
const backAfter = 25

// adoptTimeout is more than the two minutes for which the node waits for a kubelet that has no
// reason to call any more.
const adoptTimeout = 150 * time.Second

// newImage is what the case changes the slot to.
func (c *cluster) newImage(cs chaosCase) string {
	if cs.order == upBroken || cs.order == upBrokenBeside {
		return c.bed.Image(brokenImage)
	}
	return c.bed.Image(otherImage)
}

// runUpgrade has a rollout give the slot another image, meet the fault, and come to its end.
func (r *run) runUpgrade(t *testing.T) {
	ctx := t.Context()
	r.want.Image = r.newImage(r.chaosCase)
	r.rollout = &inplace.InPlaceRollout{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: r.pod},
		Spec: inplace.InPlaceRolloutSpec{
			Target:     inplace.Target{PodName: r.pod},
			Containers: []inplace.ContainerChange{{Name: slotName, Image: r.want.Image}},
			Strategy:   inplace.Strategy{ProgressDeadlineSeconds: 45},
		},
	}
	s := &r.rollout.Spec.Strategy
	switch r.order {
	case upStartFirst, upBrokenBeside:
		s.Order, s.MinReadySeconds = inplace.StartFirst, 1
	case upBroken:
		s.MinReadySeconds = 3 // it is ready for a moment
	case upBack:
		s.ProgressDeadlineSeconds = backAfter
	}
	seen := r.watch(r.before.PodUID)
	defer seen.stop()
	must(t, r.api.Create(ctx, r.rollout))
	var after *invariant.Facts
	judge := func() (err error) {
		if after, err = r.observe(ctx, r.pod); err != nil {
			return err
		}
		if err := r.rolloutEnded(ctx); err != nil {
			return err
		}
		if err := r.observeRollout(ctx, after); err != nil {
			return err
		}
		if bad := invariant.CheckUpgrade(r.before, after, r.want); len(bad) > 0 {
			return errors.New(strings.Join(bad, "\n"))
		}
		return nil
	}
	if _, err := r.strike(ctx); err != nil {
		_ = judge()
		t.Fatalf("%v\nafter: %s", err, brief(after))
	}
	timeout := settleTimeout
	if r.patient {
		timeout = adoptTimeout
	}
	err := eventually(ctx, timeout, judge)
	if err == nil {
		if err = r.relisted(ctx, 2); err == nil {
			err = eventually(ctx, glance, judge)
		}
	}
	if err != nil {
		t.Errorf("%v\nbefore: %s\nafter: %s\noperation: %v", err, brief(r.before), brief(after), after.Operation)
	}
	one := &opsv1.ContainerOperation{}
	if op := after.Operation; len(op.GetContainers()) == 1 {
		one = op.GetContainers()[0]
	}
	alone := r.order == upStopFirst || r.order == upStartFirst
	if shown := seen.stop(); alone && after.Operation.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED &&
		one.GetMethod() != "kubelet" && len(shown) > 0 {
		t.Errorf("kubelet could see: %q", shown)
	}
	t.Logf("%s: operation %s, method %q (asked for %s), gap %s, reason %q, warnings %q", after.Rollout,
		after.Operation.GetPhase(), one.GetMethod(), r.method, one.GetGap().AsDuration(),
		one.GetReason(), one.GetWarnings())
}

// rolloutEnded is nil when the rollout has ended and has let go of everything.
func (r *run) rolloutEnded(ctx context.Context) error {
	if err := r.api.Get(ctx, client.ObjectKeyFromObject(r.rollout), r.rollout); err != nil {
		return err
	}
	st := r.rollout.Status
	if st.CompletionTime == nil || st.ObservedGeneration != r.rollout.Generation {
		return fmt.Errorf("the rollout has not ended: %s", st.Message)
	}
	if r.point != "complete" && slices.Contains(r.rollout.Finalizers, inplace.RolloutFinalizer) {
		return errors.New("the rollout has not let go of its pins")
	}
	return nil
}

// observeRollout adds what an upgrade is judged by besides.
func (r *run) observeRollout(ctx context.Context, f *invariant.Facts) error {
	p := &corev1.Pod{}
	if err := r.api.Get(ctx, client.ObjectKey{Namespace: namespace, Name: r.pod}, p); err != nil {
		return err
	}
	if c := meta.FindStatusCondition(r.rollout.Status.Conditions, inplace.ConditionProgressing); c != nil {
		f.Rollout = c.Reason
	}
	// The name of the last operation is in the pod's annotation.
	var state struct{ Operation string }
	if text := p.Annotations[inplace.PodStateAnnotation]; text != "" {
		if err := json.Unmarshal([]byte(text), &state); err != nil {
			return err
		}
	}
	err := r.onNode(func(conn *grpc.ClientConn) (err error) {
		node := opsv1.NewOpsClient(conn)
		if state.Operation != "" {
			f.Operation, err = node.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: state.Operation})
			if r.want.Lost && status.Code(err) == codes.NotFound {
				f.Operation, err = nil, nil
			}
			if err != nil {
				return err
			}
		}
		list, err := node.ListOperations(ctx, &opsv1.ListOperationsRequest{ActiveOnly: true})
		for _, op := range list.GetOperations() {
			if op.GetPhase() == opsv1.Phase_PHASE_ADOPTING && !r.patient {
				continue // it waits for a kubelet whose calls were cut off, in vain
			}
			f.Active = append(f.Active, op.GetUid())
		}
		if err != nil {
			return err
		}
		pins, err := opsv1.NewImagesClient(conn).ListPins(ctx, &opsv1.ListPinsRequest{})
		for _, pin := range pins.GetPins() {
			f.Pins = append(f.Pins, pin.GetImage()+" by "+pin.GetOwner())
		}
		return err
	})
	if err != nil {
		return err
	}
	return r.onRuntime(func(conn *grpc.ClientConn) error {
		for _, name := range []string{r.bed.Image(firstImage), r.want.Image} {
			st, err := runtimeapi.NewImageServiceClient(conn).
				ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
			if err != nil {
				return err
			}
			if st.GetImage().GetPinned() {
				f.Pins = append(f.Pins, name+" in the runtime")
			}
		}
		return nil
	})
}

// removeRollout deletes the rollout, if there is one, and does not wait.
func (r *run) removeRollout(ctx context.Context) error {
	if r.rollout == nil {
		return nil
	}
	return client.IgnoreNotFound(r.api.Delete(ctx, r.rollout))
}
