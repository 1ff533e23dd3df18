// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package lost

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/crinode"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/podsapi"
)

// letPass lets a container pass that waits at its gate while nothing else of its slot runs. It
// returns false if ctx has ended before that.
func (l *slot) letPass(ctx context.Context) (over bool) {
	s := l.waits
	log := l.k.Log.WithFields(s.fields())
	g := l.k.Switchover.Gate(s.token)
	defer func() {
		if !over {
			return
		}
		if err := g.Remove(); err != nil {
			log.WithError(err).Warn("gate not removed")
		}
	}()
	if l.unwanted(ctx, s) {
		log.Warn("a container that no operation knows waits at its gate and is not what the pod's spec asks for: " +
			"kubelet replaces it")
		return true
	}
	err := l.openGate(ctx, g)
	switch {
	case err == nil:
		log.Warn("a container that no operation knows was waiting at its gate, and the one before it has " +
			"ended: it begins")
		now := time.Now()
		l.k.Records.SetStarted(s.id, now)
		l.k.View.SetStarted(s.id, now)
		return true
	case ctx.Err() != nil:
		g.Leave() // for the next process
		return false
	case errors.Is(err, errPassed):
		return true
	}
	_, info, ierr := l.k.Node.Inspect(ctx, s.id)
	waits := ierr == nil && l.k.Switchover.StillWaits(ctx, info.PID, s.id)
	switch {
	case ctx.Err() != nil:
		g.Leave() // for the next process
		return false
	case waits:
		// Nobody can let it pass: kubelet's policy is for a container that has ended.
		log.WithError(err).Warn("a container that no operation knows cannot pass its gate, and is stopped")
		if err := l.stopWithin(ctx, s.id, crinode.MinGrace); err != nil {
			log.WithError(err).Warn("container not stopped")
		}
	}
	return true
}

// errPassed says that nothing waits at a gate any more.
var errPassed = errors.New("it has passed its gate, or ended")

// openGate opens the gate once the container waits there.
func (l *slot) openGate(ctx context.Context, g *gate.Gate) error {
	ctx, cancel := context.WithTimeout(ctx, l.k.Switchover.GateTimeout)
	defer cancel()
	if l.hold != nil {
		var end func()
		ctx, end = crinode.EndWith(ctx, l.hold.Yielded())
		defer end()
	}
	id := l.waits.id
	err := g.Await(ctx, func() error {
		st, info, err := l.k.Node.Inspect(ctx, id)
		switch {
		case status.Code(err) == codes.NotFound, err == nil &&
			st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING:
			return errPassed
		case err == nil && l.k.Switchover.OfContainer(info.PID, id) == nil && !gate.Waiting(info.PID):
			return errPassed
		}
		return nil // the runtime may be restarting
	})
	if err != nil {
		return err
	}
	return g.Open()
}

// unwanted reports whether kubelet says that the pod's spec has another image than the container
// was made for. A container that waits does not begin then; kubelet finds it running with another
// hash than the spec's, and replaces it whatever the pod's restart policy is.
func (l *slot) unwanted(ctx context.Context, s *stray) bool {
	if l.k.Pods == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, podsapi.Timeout)
	defer cancel()
	name := s.labels[criclone.LabelContainer]
	pod, err := l.k.Pods.Pod(ctx, s.labels[criclone.LabelPodUID])
	if err != nil || pod.Images[name] == "" {
		return false
	}
	st, err := l.k.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: s.id})
	hash := st.GetStatus().GetAnnotations()[criclone.AnnotationHash]
	return err == nil && hash != criclone.KubeletHash(name, pod.Images[name])
}
