// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package criclone works on CRI messages without asking anybody: it clones the request that made a
// container, compares two requests, computes kubelet's hash and checks images. The one thing that
// it writes is the termination message file of a clone.
package criclone

import (
	"errors"
	"maps"
	"path"
	"strconv"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
)

// Clone returns the request that creates the successor of a container: req, which created the
// incumbent, with everything changed that kubelet would change on a restart
// (kuberuntime_container.go generateContainerConfig). applied are the resources that were set on
// the incumbent since. token becomes the value of [view.StagedAnnotation].
func Clone(
	req *runtimeapi.CreateContainerRequest, applied *runtimeapi.LinuxContainerResources, attempt uint32, token string,
) (*runtimeapi.CreateContainerRequest, error) {
	next := proto.Clone(req).(*runtimeapi.CreateContainerRequest)
	c := next.GetConfig()
	if c.GetMetadata() == nil {
		return nil, errors.New("the recorded request has no container metadata")
	}
	c.Metadata.Attempt = attempt
	c.LogPath = path.Join(path.Dir(c.GetLogPath()), strconv.FormatUint(uint64(attempt), 10)+".log")
	c.Annotations = maps.Clone(c.GetAnnotations())
	if c.Annotations == nil {
		c.Annotations = map[string]string{}
	}
	c.Annotations[AnnotationRestartCount] = strconv.FormatUint(uint64(attempt), 10)
	c.Annotations[view.StagedAnnotation] = token
	if c.GetLinux() != nil && applied != nil {
		c.Linux.Resources = OverlayResources(c.Linux.Resources, applied)
	}
	if m := terminationMount(c); m != nil {
		m.HostPath = path.Join(path.Dir(m.GetHostPath()), terminationFileName(token))
	}
	return next, nil
}
