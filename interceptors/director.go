// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// Records keeps what kubelet said about its containers, for cloning them later.
// Implementations must be safe for concurrent use and must not block for long:
// they are called on kubelet's calls.
type Records interface {
	// Created stores the encoded CreateContainerRequest that made the container.
	Created(id string, request []byte)
	// Updated stores the encoded LinuxContainerResources last applied to it.
	Updated(id string, resources []byte)
	// Removed forgets the container.
	Removed(id string)
}

// Pulls is told of kubelet's pulls.
type Pulls interface {
	// KubeletPulls says that kubelet pulls an image, until done is called; an empty name is one that is not known. It must not block.
	KubeletPulls(image string) (done func())
}

// Images knows the images that kubelet is to pull for itself before it is shown them. Its methods must not block.
type Images interface {
	// AnyUnclaimed reports whether there is any; it is asked on the pass path.
	AnyUnclaimed() bool
	// Unclaimed reports whether the image is one.
	Unclaimed(image *runtimeapi.Image) bool
	// Claimed says that kubelet has pulled the image with that ID.
	Claimed(imageID string)
}

// Overrides knows the slots whose image is not the one in the pod's spec. Its methods must not block for long.
type Overrides interface {
	// Any reports whether there is any; it is asked on the pass path.
	Any() bool
	// Apply puts the slot's image into kubelet's request, if it has one of its own, and reports whether it has. An error is the answer to kubelet.
	Apply(ctx context.Context, slot Slot, req *runtimeapi.CreateContainerRequest) (bool, error)
	// SandboxRemoved says that some sandbox has been removed.
	SandboxRemoved()
}

// Pods tells kubelet's mind about pods.
type Pods interface {
	// Kept reports whether kubelet tells that the pod is not on its way out. It is false where kubelet does not tell.
	Kept(ctx context.Context, podUID string) bool
}

// Successors knows the containers that operations have made.
type Successors interface {
	// Fits reports whether the container is the one that kubelet asks for, and gives it the resources that kubelet asks for.
	Fits(ctx context.Context, id string, req *runtimeapi.CreateContainerRequest) bool
}

// Options configures a [Director]. All fields but Pulls, Images, Pods, Successors, Overrides, Registerer and Judge are required.
type Options struct {
	View    *View
	Records Records
	// Runtime is for the few calls that an interceptor makes of its own.
	Runtime grpc.ClientConnInterface
	Log     logrus.FieldLogger
	Pulls   Pulls
	// Images, if nil, are all shown as they are.
	Images Images
	// Pods, if nil, tells nothing.
	Pods Pods
	// Successors, if nil, are none that fit.
	Successors Successors
	// Overrides, if nil, are none.
	Overrides Overrides
	// Registerer gets the metrics. Nil: they are kept but not served.
	Registerer prometheus.Registerer
	// Judge is asked while the view has a guard. Nil: there is nothing to judge.
	Judge Judge
}

// Director implements [proxy.Director]: it takes a method only while the view has
// something to say about it, except for the few that it records always.
type Director struct {
	view      *View
	records   Records
	overrides Overrides
	images    Images // may be nil
	judge     Judge
	pods      Pods       // may be nil
	made      Successors // may be nil
	runtime   runtimeapi.RuntimeServiceClient
	log       logrus.FieldLogger

	always map[string]proxy.UnaryInterceptor
	active map[string]proxy.UnaryInterceptor
	image  map[string]proxy.UnaryInterceptor
	stream map[string]proxy.StreamInterceptor
}

var (
	_ proxy.Director = (*Director)(nil)
	_ proxy.Passer   = (*Director)(nil)
)

// New returns a director over the view.
func New(o Options) *Director {
	d := &Director{view: o.View, records: o.Records, runtime: runtimeapi.NewRuntimeServiceClient(o.Runtime), log: o.Log, overrides: o.Overrides, pods: o.Pods, made: o.Successors, images: o.Images, judge: o.Judge}
	if d.overrides == nil {
		d.overrides = noOverrides{}
	}
	d.always = map[string]proxy.UnaryInterceptor{
		runtimeapi.RuntimeService_CreateContainer_FullMethodName:          d.createContainer,
		runtimeapi.RuntimeService_StartContainer_FullMethodName:           d.startContainer,
		runtimeapi.RuntimeService_RemoveContainer_FullMethodName:          d.removeContainer,
		runtimeapi.RuntimeService_UpdateContainerResources_FullMethodName: d.updateContainerResources,
		runtimeapi.RuntimeService_StopPodSandbox_FullMethodName:           d.stopPodSandbox,
		runtimeapi.RuntimeService_StopContainer_FullMethodName:            d.stopContainer,
		// An operation may begin while they are under way, and then their end has to do with it.
		runtimeapi.RuntimeService_RemovePodSandbox_FullMethodName: d.removePodSandbox,
		runtimeapi.RuntimeService_ExecSync_FullMethodName:         d.execSync,
	}
	if o.Pulls != nil {
		d.always[runtimeapi.ImageService_PullImage_FullMethodName] = pullImage(o.Pulls, o.Images)
	}
	if o.Images != nil {
		d.image = map[string]proxy.UnaryInterceptor{runtimeapi.ImageService_ImageStatus_FullMethodName: d.imageStatus}
	}
	d.active = map[string]proxy.UnaryInterceptor{
		runtimeapi.RuntimeService_ListContainers_FullMethodName:        d.listContainers,
		runtimeapi.RuntimeService_ContainerStatus_FullMethodName:       d.containerStatus,
		runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName:      d.podSandboxStatus,
		runtimeapi.RuntimeService_ContainerStats_FullMethodName:        d.containerStats,
		runtimeapi.RuntimeService_ListContainerStats_FullMethodName:    d.listContainerStats,
		runtimeapi.RuntimeService_PodSandboxStats_FullMethodName:       d.podSandboxStats,
		runtimeapi.RuntimeService_ListPodSandboxStats_FullMethodName:   d.listPodSandboxStats,
		runtimeapi.RuntimeService_ListPodSandboxMetrics_FullMethodName: d.listPodSandboxMetrics,
		runtimeapi.RuntimeService_Exec_FullMethodName:                  d.exec,
		runtimeapi.RuntimeService_Attach_FullMethodName:                d.attach,
		runtimeapi.RuntimeService_ReopenContainerLog_FullMethodName:    d.reopenContainerLog,
		runtimeapi.RuntimeService_CheckpointContainer_FullMethodName:   d.checkpointContainer,
	}
	d.stream = map[string]proxy.StreamInterceptor{
		runtimeapi.RuntimeService_GetContainerEvents_FullMethodName:      d.getContainerEvents,
		runtimeapi.RuntimeService_StreamContainers_FullMethodName:        d.streamContainers,
		runtimeapi.RuntimeService_StreamContainerStats_FullMethodName:    d.streamContainerStats,
		runtimeapi.RuntimeService_StreamPodSandboxStats_FullMethodName:   d.streamPodSandboxStats,
		runtimeapi.RuntimeService_StreamPodSandboxMetrics_FullMethodName: d.streamPodSandboxMetrics,
	}
	counts, err := newDecisions(o.Registerer)
	if err != nil {
		o.Log.WithError(err).Warn("metric not registered")
	}
	for _, methods := range []map[string]proxy.UnaryInterceptor{d.always, d.active, d.image} {
		for method, take := range methods {
			methods[method] = newCounter(counts, method).unary(d.unaryJudged(method, take))
		}
	}
	for method, take := range d.stream {
		d.stream[method] = newCounter(counts, method).stream(d.streamJudged(method, take))
	}
	return d
}

// noOverrides is where there are none.
type noOverrides struct{}

func (noOverrides) Any() bool { return false }
func (noOverrides) Apply(context.Context, Slot, *runtimeapi.CreateContainerRequest) (bool, error) {
	return false, nil
}
func (noOverrides) SandboxRemoved() {}

// tellsStart are the methods whose answer has the start of a container in it.
var tellsStart = map[string]bool{
	runtimeapi.RuntimeService_ContainerStatus_FullMethodName:  true,
	runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName: true,
}

// tellsOf are the methods whose answers tell of containers. Those of others show nothing that is
// hidden, however long they have been under way when it is hidden: a call into a container, such as
// a hook of 30 s, is addressed to the one that its caller knows.
var tellsOf = map[string]bool{
	runtimeapi.RuntimeService_ListContainers_FullMethodName:        true,
	runtimeapi.RuntimeService_ContainerStatus_FullMethodName:       true,
	runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName:      true,
	runtimeapi.RuntimeService_ContainerStats_FullMethodName:        true,
	runtimeapi.RuntimeService_ListContainerStats_FullMethodName:    true,
	runtimeapi.RuntimeService_PodSandboxStats_FullMethodName:       true,
	runtimeapi.RuntimeService_ListPodSandboxStats_FullMethodName:   true,
	runtimeapi.RuntimeService_ListPodSandboxMetrics_FullMethodName: true,
}

// Unary implements [proxy.Director].
func (d *Director) Unary(method string) proxy.UnaryInterceptor {
	if ic, ok := d.always[method]; ok {
		return ic
	}
	if ic, ok := d.image[method]; ok && d.images.AnyUnclaimed() {
		return ic
	}
	d.listsSandboxes(method)
	if d.view.Active() || d.view.Guarded() || (d.view.starts.Load() > 0 && tellsStart[method]) {
		return d.active[method]
	}
	return nil
}

// Stream implements [proxy.Director]. Streams are always taken, because an operation may
// begin while they are open; their filters look at a message only while the view is active.
func (d *Director) Stream(method string) proxy.StreamInterceptor {
	d.listsSandboxes(method)
	return d.stream[method]
}

// listsSandboxes tells the view of a call that lists sandboxes; what is listed is nothing to it.
func (d *Director) listsSandboxes(method string) {
	switch method {
	case runtimeapi.RuntimeService_ListPodSandbox_FullMethodName, runtimeapi.RuntimeService_StreamPodSandboxes_FullMethodName:
		d.view.listsSandboxes()
	}
}

// Pass implements [proxy.Passer].
func (d *Director) Pass(method string) (done func(), ok bool) {
	if !tellsOf[method] {
		return nil, true
	}
	return d.view.pass(method)
}

// decode fills m from an encoded message; its error makes the proxy pass the call.
func decode[M proto.Message](b []byte, m M) (M, error) {
	if err := proto.Unmarshal(b, m); err != nil {
		return m, &proxy.PassError{Err: fmt.Errorf("decoding %s: %w", m.ProtoReflect().Descriptor().FullName(), err)}
	}
	return m, nil
}

func encode(m proto.Message) ([]byte, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, &proxy.PassError{Err: fmt.Errorf("encoding %s: %w", m.ProtoReflect().Descriptor().FullName(), err)}
	}
	return b, nil
}

// forward sends req on, decodes the answer into resp, lets change edit it and encodes it again.
func forward[M proto.Message](ctx context.Context, req []byte, next proxy.UnaryNext, resp M, change func(M)) ([]byte, error) {
	b, err := next(ctx, req)
	if err != nil {
		return nil, err
	}
	if _, err := decode(b, resp); err != nil {
		return nil, err
	}
	change(resp)
	return encode(resp)
}

// notFound is containerd's own answer for a container it does not know
// (internal/cri/server/container_status.go), so that a hidden one cannot be told from none.
func notFound(id string) error {
	return status.Errorf(codes.NotFound, "an error occurred when try to find container %q: not found", id)
}

// without returns s without the elements that drop reports. It reuses s.
func without[T any](s []T, drop func(T) bool) []T {
	kept := s[:0]
	for _, e := range s {
		if !drop(e) {
			kept = append(kept, e)
		}
	}
	return kept
}
