// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// stopPodSandbox makes all operations in the sandbox yield first.
func (l *lifecycle) stopPodSandbox(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.StopPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	if l.keeps(ctx, req.GetPodSandboxId()) {
		did(ctx, didKeep)
		return encode(&runtimeapi.StopPodSandboxResponse{})
	}
	defer l.view.StopBegins(req.GetPodSandboxId())()
	l.takeBackSandbox(ctx, method, req.GetPodSandboxId())
	l.stopSuccessors(ctx, req.GetPodSandboxId())
	return next(ctx, raw)
}

// keeps reports whether a stop of the sandbox is not for the runtime.
//
// Kubelet has stopped the last container of a pod that is never restarted, because of a failed
// probe, and now gives the pod up (kuberuntime_manager.go computePodActions: KillPod). But another
// container has taken that one's place. If kubelet says that it has no other reason, such as a
// deletion, the sandbox is kept, and kubelet's next sync finds the container running in it. This
// happens once for each stop of a container. Where it is wrong, kubelet finds the container
// running, stops it and asks again (kubelet.go SyncTerminatingPod).
func (l *lifecycle) keeps(ctx context.Context, sandbox string) bool {
	successors := l.view.StoppedAfterRevealIn(sandbox)
	if l.pods == nil || len(successors) == 0 {
		return false
	}
	st, err := l.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil || !serves(st.GetStatus()) || !l.pods.Kept(ctx, st.GetStatus().GetMetadata().GetUid()) {
		return false
	}
	for _, s := range successors {
		st, err := l.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: s.ID})
		if err != nil || st.GetStatus().GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		for _, s := range successors {
			l.view.Adopted(s.ID)
		}
		l.log.WithField("successor", s.ID).Info("kubelet gives the pod up for a container that has been replaced: " +
			"its sandbox is kept, and kubelet finds the successor running")
		return true
	}
	return false
}

// serves reports whether kubelet would not replace the sandbox (pkg/kubelet/kuberuntime/util
// PodSandboxChanged).
func serves(s *runtimeapi.PodSandboxStatus) bool {
	host := s.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
	return s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY && (host || s.GetNetwork().GetIp() != "")
}

// maxSuccessorGrace bounds the grace of a successor, in seconds: kubelet waits two minutes for
// StopPodSandbox.
const maxSuccessorGrace = 90

// stopSuccessors asks containers to stop that the runtime would kill with the sandbox. Kubelet
// began to kill the pod, with a long preStop perhaps, before a restart was revealed, and stopped
// only the container that it saw then. That stop is too early to stop the successor: after a failed
// liveness probe it looks the same, and then kubelet finds the fresh container and is content.
func (l *lifecycle) stopSuccessors(ctx context.Context, sandbox string) {
	var wg sync.WaitGroup
	for _, s := range l.view.StoppedAfterRevealIn(sandbox) {
		did(ctx, didStop)
		wg.Go(func() {
			log := l.log.WithFields(logrus.Fields{"successor": s.ID})
			defer func() { // nobody else guards this goroutine, and kubelet's call goes on without it
				if p := recover(); p != nil {
					log.WithFields(logrus.Fields{"panic": p, "stack": string(debug.Stack())}).
						Error("container not stopped before its sandbox: the daemon would have panicked; please " +
							"report this")
				}
			}()
			log.Info("the pod goes away, stopping the container that took the place of the one that kubelet stopped")
			stop := &runtimeapi.StopContainerRequest{ContainerId: s.ID, Timeout: min(s.Grace, maxSuccessorGrace)}
			if _, err := l.runtime.StopContainer(ctx, stop); err != nil {
				log.WithError(err).Warn("container not stopped before its sandbox")
			}
		})
	}
	wg.Wait()
}

// removePodSandbox makes all operations in the sandbox yield first. It stops what still runs in
// the sandbox, as the runtime does (sandbox_remove.go in containerd).
func (l *lifecycle) removePodSandbox(
	ctx context.Context, method string, raw []byte, next proxy.UnaryNext,
) ([]byte, error) {
	req, err := decode(raw, &runtimeapi.RemovePodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	defer l.view.StopBegins(req.GetPodSandboxId())()
	l.takeBackSandbox(ctx, method, req.GetPodSandboxId())
	b, err := next(ctx, raw)
	if err == nil {
		l.view.ForgetSandbox(req.GetPodSandboxId())
		if l.overrides.Any() {
			l.overrides.SandboxRemoved()
		}
	}
	return b, err
}

// sandboxGrace is what a successor gets to stop when its sandbox goes away, in seconds: kubelet's
// own minimum (minimumGracePeriodInSeconds in kuberuntime_manager.go).
const sandboxGrace = 2

// sandboxTimeout bounds what a call for a sandbox waits, for all operations in it, before it goes
// on to the runtime: kubelet gives it two minutes (runtimeRequestTimeout), and the runtime needs
// some of them.
const sandboxTimeout = time.Minute

// takeBackSandbox makes the operations in the sandbox yield, and waits for them.
func (l *lifecycle) takeBackSandbox(ctx context.Context, method, sandbox string) {
	claims := l.view.BySandbox(sandbox)
	for _, c := range claims {
		did(ctx, didYield)
		c.TakeBack(view.Yield{Method: method, Grace: sandboxGrace})
		l.log.WithFields(logrusFields(c.Slot(), method)).Info("the pod goes away, its operation yields")
	}
	wait, cancel := context.WithTimeout(ctx, sandboxTimeout)
	defer cancel()
	for _, c := range claims {
		l.awaitYield(wait, c, sandboxGrace*time.Second)
	}
}
