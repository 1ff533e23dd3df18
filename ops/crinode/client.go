// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package crinode calls the container runtime of the node as operations need it: with deadlines,
// with retries while the runtime is away, and with look-ups of pods and containers.
package crinode

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/ops/criclone"
	"github.com/cri-proxy/cri-proxy/ops/gate"
	"github.com/cri-proxy/cri-proxy/ops/operation"
)

const (
	// CallTimeout bounds one call to the runtime: kubelet's own runtimeRequestTimeout.
	CallTimeout = 2 * time.Minute
	// MinGrace is kubelet's minimumGracePeriodInSeconds (kuberuntime_manager.go).
	MinGrace = 2 * time.Second
	// DefaultGrace is the API's default terminationGracePeriodSeconds, for pods that tell none.
	DefaultGrace = 30 * time.Second
	// MaxLateGrace bounds the grace of a container that nobody knows, or that is not what kubelet
	// asks for: kubelet waits two minutes for StopPodSandbox and for CreateContainer.
	MaxLateGrace = 90 * time.Second
	// MaxTries bounds the tries of a call that answers Unavailable although the runtime answers
	// other calls: about 20 s together. There is no bound on waiting for a runtime that answers
	// nothing.
	MaxTries = 12
)

// Client calls the runtime.
type Client struct {
	Runtime runtimeapi.RuntimeServiceClient
	Log     logrus.FieldLogger
}

// Bound returns conn with calls that end after [CallTimeout] if they have no deadline of their own:
// an operation that waited for a hanging runtime would keep kubelet's calls for the container
// waiting too, for ever.
func Bound(conn grpc.ClientConnInterface) grpc.ClientConnInterface { return bounded{conn} }

type bounded struct{ grpc.ClientConnInterface }

func (b bounded) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	// ExecSync runs a hook, which lasts as long as its command, as with kubelet.
	if _, has := ctx.Deadline(); !has && method != runtimeapi.RuntimeService_ExecSync_FullMethodName {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, CallTimeout)
		defer cancel()
	}
	return b.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

// RuncType is containerd's runtime type for runc and its replacements (crun,
// nvidia-container-runtime). Other types, such as gVisor and Kata, do not run hooks inside the
// container.
const RuncType = "io.containerd.runc.v2"

// Info is what containerd reports in a verbose status (internal/cri/server/container_status.go).
type Info struct {
	PID         int    `json:"pid"`
	RuntimeType string `json:"runtimeType"`
}

// Inspect returns the container's status and what the runtime reports beyond CRI. The [Info] is
// zero if the runtime reports nothing, or something unknown.
func (c *Client) Inspect(ctx context.Context, id string) (*runtimeapi.ContainerStatus, Info, error) {
	var info Info
	st, err := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, info, err
	}
	if raw := st.GetInfo()["info"]; raw != "" {
		if err := json.Unmarshal([]byte(raw), &info); err != nil {
			c.Log.WithField("container", id).WithError(err).Warn("verbose status not understood")
		}
	}
	return st.GetStatus(), info, nil
}

// ReadRequest puts together the request that created a container from the runtime's verbose
// status, for a container that is older than cri-proxy.
func (c *Client) ReadRequest(ctx context.Context, id, sandbox string) (*runtimeapi.CreateContainerRequest, error) {
	st, err := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("reading the container's config: %w", err)
	}
	config := &runtimeapi.ContainerConfig{}
	if err := criclone.DecodeConfig(st.GetInfo(), config); err != nil {
		return nil, fmt.Errorf("container %s is older than cri-proxy and %w: "+
			"let kubelet restart it once (delete the pod)", id, err)
	}
	gate.Strip(config)
	for _, m := range config.GetMounts() {
		if m.GetImage() != nil {
			// containerd fills in where it mounted the image volume (container_create.go
			// mutateMounts).
			m.HostPath = ""
		}
	}
	for _, kv := range config.GetEnvs() {
		if strings.ContainsRune(string(kv.GetValue()), '\ufffd') {
			return nil, fmt.Errorf("container %s is older than cri-proxy and its variable %s is not UTF-8, "+
				"which the runtime's record cannot tell: let kubelet restart it once (delete the pod)", id, kv.GetKey())
		}
	}
	sb, err := c.Runtime.PodSandboxStatus(ctx,
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox, Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("reading the sandbox's config: %w", err)
	}
	sandboxConfig := &runtimeapi.PodSandboxConfig{}
	if err := criclone.DecodeConfig(sb.GetInfo(), sandboxConfig); err != nil {
		return nil, fmt.Errorf("of sandbox %s, which is older than cri-proxy, %w: "+
			"let kubelet make it anew (delete the pod)", sandbox, err)
	}
	return &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: config, SandboxConfig: sandboxConfig}, nil
}

// FindStaged returns the ID of the container in the sandbox that carries the token, or "".
func (c *Client) FindStaged(ctx context.Context, sandbox, token string) (string, error) {
	call, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	list, err := c.Runtime.ListContainers(call, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{PodSandboxId: sandbox},
	})
	if err != nil {
		return "", fmt.Errorf("listing containers: %w", err)
	}
	for _, found := range list.GetContainers() {
		if found.GetAnnotations()[view.StagedAnnotation] == token {
			return found.GetId(), nil
		}
	}
	return "", nil
}

// StartOnce starts the container, unless it has been started before: the process before this one
// may have crashed, or the runtime restarted, during the call.
//
// It returns ctx's error or a [*operation.Outcome].
func (c *Client) StartOnce(ctx context.Context, id string) error {
	for try := 1; ; try++ {
		// Not bound to ctx: a cancelled StartContainer destroys the container.
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), CallTimeout)
		_, err := c.Runtime.StartContainer(call, &runtimeapi.StartContainerRequest{ContainerId: id})
		cancel()
		if err == nil {
			return nil
		}
		again := status.Code(err) == codes.Unavailable && try < MaxTries
		if again {
			if err := c.AwaitReturn(ctx, try); err != nil {
				return err
			}
		}
		st, serr := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if serr != nil {
			if again && status.Code(serr) == codes.Unavailable {
				continue
			}
			return startFailed(err)
		}
		switch s := st.GetStatus(); {
		case s.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING:
			return nil // it had been started before
		case hasRun(s):
			return nil // it had been started before, and has ended: kubelet's policy decides
		case s.GetState() == runtimeapi.ContainerState_CONTAINER_CREATED && again:
			continue
		default:
			return startFailed(err)
		}
	}
}

func startFailed(err error) *operation.Outcome {
	return operation.Failf(opsv1.ReasonStartFailed, "starting the new container: %v", status.Convert(err).Message())
}

// startError is containerd's reason for a container whose start failed
// (internal/cri/server/container_start.go errorStartReason).
const startError = "StartError"

// hasRun reports whether a container has exited after a start that succeeded.
func hasRun(s *runtimeapi.ContainerStatus) bool {
	return s.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED &&
		s.GetReason() != startError && s.GetStartedAt() != 0
}

// Stop stops the container within what is left of its grace period, which ends at by.
//
// It returns ctx's error or a [*operation.Outcome].
func (c *Client) Stop(ctx context.Context, id string, by time.Time) error {
	for try := 1; ; try++ {
		left := max(time.Until(by), MinGrace)
		seconds := int64((left + time.Second - 1) / time.Second)
		// Not bound to ctx: a cancelled StopContainer never kills.
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), left+CallTimeout)
		_, err := c.Runtime.StopContainer(call, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: seconds})
		cancel()
		if err == nil || status.Code(err) == codes.NotFound { // somebody has removed it meanwhile
			return nil
		}
		if status.Code(err) != codes.Unavailable || try == MaxTries {
			return operation.Failf(opsv1.ReasonStopFailed, "stopping the container: %v", status.Convert(err).Message())
		}
		if err := c.AwaitReturn(ctx, try); err != nil {
			return err
		}
	}
}

// StopWithin stops a container with the given grace period, in one call that ctx does not end.
func (c *Client) StopWithin(ctx context.Context, id string, grace time.Duration) error {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+CallTimeout)
	defer cancel()
	_, err := c.Runtime.StopContainer(call, &runtimeapi.StopContainerRequest{
		ContainerId: id, Timeout: int64(grace / time.Second),
	})
	return err
}
