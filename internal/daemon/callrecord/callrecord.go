// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package callrecord

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// Line is one line of the file. Which of the optional fields it has depends on the method; none of
// them has environment, arguments or credentials.
type Line struct {
	// Time is when the call was answered.
	Time time.Time `json:"time"`
	// Method is the full name, such as /runtime.v1.RuntimeService/StopContainer.
	Method string `json:"method"`
	// Code is the gRPC code of the answer, such as OK or NotFound.
	Code        string `json:"code"`
	ContainerID string `json:"containerID,omitempty"`
	SandboxID   string `json:"sandboxID,omitempty"`
	// Container, Pod, Namespace and PodUID are names as kubelet gave them.
	Container string  `json:"container,omitempty"`
	Pod       string  `json:"pod,omitempty"`
	Namespace string  `json:"namespace,omitempty"`
	PodUID    string  `json:"podUID,omitempty"`
	Attempt   *uint32 `json:"attempt,omitempty"`
	Image     string  `json:"image,omitempty"`
	// Timeout is the grace of StopContainer in seconds.
	Timeout *int64 `json:"timeout,omitempty"`
}

// File is a [proxy.CallRecorder] that writes JSON lines.
type File struct {
	log logrus.FieldLogger

	mu     sync.Mutex // guards all following fields
	f      *os.File
	failed bool
}

var _ proxy.CallRecorder = (*File)(nil)

// Open appends to the file at path. Only the owner may read a file that Open creates.
func Open(path string, log logrus.FieldLogger) (*File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("record-calls: %w", err)
	}
	log.WithField("file", path).Warn("recording every CRI call, this is for debugging")
	return &File{f: f, log: log}, nil
}

// Record implements [proxy.CallRecorder].
func (c *File) Record(method string, req []byte, code codes.Code) {
	line := Line{Time: time.Now().UTC(), Method: method, Code: code.String()}
	line.decode(method, req)
	b, err := json.Marshal(line)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.f != nil {
		_, err = c.f.Write(append(b, '\n'))
	}
	if err != nil && !c.failed {
		c.failed = true
		c.log.WithError(err).Error("call not recorded, this is said once")
	}
}

// Close ends the recording.
func (c *File) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.f
	c.f = nil
	return f.Close()
}

// decode fills in the fields that the request of the method has. It leaves out what does not
// decode: the runtime's answer is in Code.
func (l *Line) decode(method string, req []byte) {
	switch method[strings.LastIndexByte(method, '/')+1:] {
	case "RunPodSandbox":
		if m := new(runtimeapi.RunPodSandboxRequest); proto.Unmarshal(req, m) == nil {
			l.pod(m.GetConfig())
			attempt := m.GetConfig().GetMetadata().GetAttempt()
			l.Attempt = &attempt
		}
	case "StopPodSandbox":
		if m := new(runtimeapi.StopPodSandboxRequest); proto.Unmarshal(req, m) == nil {
			l.SandboxID = m.GetPodSandboxId()
		}
	case "RemovePodSandbox":
		if m := new(runtimeapi.RemovePodSandboxRequest); proto.Unmarshal(req, m) == nil {
			l.SandboxID = m.GetPodSandboxId()
		}
	case "CreateContainer":
		if m := new(runtimeapi.CreateContainerRequest); proto.Unmarshal(req, m) == nil {
			l.SandboxID = m.GetPodSandboxId()
			l.pod(m.GetSandboxConfig())
			l.Container = m.GetConfig().GetMetadata().GetName()
			attempt := m.GetConfig().GetMetadata().GetAttempt()
			l.Attempt = &attempt
			l.Image = m.GetConfig().GetImage().GetImage()
		}
	case "StartContainer":
		if m := new(runtimeapi.StartContainerRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
		}
	case "StopContainer":
		if m := new(runtimeapi.StopContainerRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
			timeout := m.GetTimeout()
			l.Timeout = &timeout
		}
	case "RemoveContainer":
		if m := new(runtimeapi.RemoveContainerRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
		}
	case "UpdateContainerResources":
		if m := new(runtimeapi.UpdateContainerResourcesRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
		}
	case "ContainerStatus":
		if m := new(runtimeapi.ContainerStatusRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
		}
	case "ExecSync":
		if m := new(runtimeapi.ExecSyncRequest); proto.Unmarshal(req, m) == nil {
			l.ContainerID = m.GetContainerId()
		}
	case "PullImage":
		if m := new(runtimeapi.PullImageRequest); proto.Unmarshal(req, m) == nil {
			l.Image = m.GetImage().GetImage()
		}
	case "RemoveImage":
		if m := new(runtimeapi.RemoveImageRequest); proto.Unmarshal(req, m) == nil {
			l.Image = m.GetImage().GetImage()
		}
	}
}

func (l *Line) pod(c *runtimeapi.PodSandboxConfig) {
	m := c.GetMetadata()
	l.Pod, l.Namespace, l.PodUID = m.GetName(), m.GetNamespace(), m.GetUid()
}
