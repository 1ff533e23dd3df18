// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
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
	// KubeletPulls says that kubelet pulls an image, until done is called. The name is empty if it
	// is not known. KubeletPulls must not block.
	KubeletPulls(image string) (done func())
}

// Images knows the images that kubelet is to pull for itself before it is shown them. Its methods
// must not block.
type Images interface {
	// AnyUnclaimed reports whether there is any; it is asked on the pass path.
	AnyUnclaimed() bool
	// Unclaimed reports whether the image is one.
	Unclaimed(image *runtimeapi.Image) bool
	// Claimed says that kubelet has pulled the image with that ID.
	Claimed(imageID string)
}

// Overrides knows the slots whose image is not the one in the pod's spec. Its methods must not
// block for long.
type Overrides interface {
	// Any reports whether there is any; it is asked on the pass path.
	Any() bool
	// Apply puts the slot's image into kubelet's request, if the slot has one of its own, and
	// reports whether it has. An error is the answer to kubelet.
	Apply(ctx context.Context, slot view.Slot, req *runtimeapi.CreateContainerRequest) (bool, error)
	// SandboxRemoved says that some sandbox has been removed.
	SandboxRemoved()
}

// Pods tells what kubelet means to do with pods.
type Pods interface {
	// Kept reports whether kubelet says that the pod is to stay. It is false where kubelet does not
	// say.
	Kept(ctx context.Context, podUID string) bool
}

// Successors knows the containers that operations have made.
type Successors interface {
	// Fits reports whether the container is the one that kubelet asks for, and gives it the
	// resources that kubelet asks for.
	Fits(ctx context.Context, id string, req *runtimeapi.CreateContainerRequest) bool
}

// Options configures a [Director]. View, Records, Runtime and Log are required.
type Options struct {
	View    *view.View
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

// Director implements [proxy.Director]. It takes a call when its table of methods says so. All
// others pass undecoded.
type Director struct {
	view    *view.View
	images  Images // may be nil
	judge   Judge  // may be nil
	log     logrus.FieldLogger
	methods map[string]*method // by full name
}

var (
	_ proxy.Director = (*Director)(nil)
	_ proxy.Passer   = (*Director)(nil)
	_ proxy.Depender = (*Director)(nil)
)

// New returns a director over the view.
func New(o Options) *Director {
	l := &lifecycle{
		view: o.View, records: o.Records, overrides: o.Overrides, pods: o.Pods, made: o.Successors,
		runtime: runtimeapi.NewRuntimeServiceClient(o.Runtime), log: o.Log,
	}
	if l.overrides == nil {
		l.overrides = noOverrides{}
	}
	counts, err := newDecisions(o.Registerer)
	if err != nil {
		o.Log.WithError(err).Warn("metric not registered")
	}
	d := &Director{view: o.View, images: o.Images, judge: o.Judge, log: o.Log}
	d.methods = table(l, &answers{o.View}, &processes{o.View}, &imageCalls{pulls: o.Pulls, images: o.Images})
	for name, m := range d.methods {
		c := newCounter(counts, name)
		if m.unary != nil {
			m.unary = c.unary(d.unaryJudged(m, m.unary))
		}
		if m.stream != nil {
			m.stream = c.stream(d.streamJudged(m, m.stream))
		}
	}
	return d
}

// noOverrides is where there are none.
type noOverrides struct{}

func (noOverrides) Any() bool { return false }
func (noOverrides) Apply(context.Context, view.Slot, *runtimeapi.CreateContainerRequest) (bool, error) {
	return false, nil
}
func (noOverrides) SandboxRemoved() {}

// Unary implements [proxy.Director].
func (d *Director) Unary(name string) proxy.UnaryInterceptor {
	m := d.methods[name]
	if m == nil {
		return nil
	}
	if m.relists {
		d.view.AckSandboxList()
	}
	switch m.take {
	case always:
		return m.unary
	case whileUnclaimed:
		if m.unary != nil && d.images.AnyUnclaimed() {
			return m.unary
		}
	case whileActive:
		if d.view.Active() || d.view.Guarded() || m.starts && d.view.StartsKnown() {
			return m.unary
		}
	}
	return nil
}

// Stream implements [proxy.Director]. Streams are always taken, because an operation may
// begin while they are open; their filters look at a message only while the view is active.
func (d *Director) Stream(name string) proxy.StreamInterceptor {
	m := d.methods[name]
	if m == nil {
		return nil
	}
	if m.relists {
		d.view.AckSandboxList()
	}
	return m.stream
}

// Pass implements [proxy.Passer].
func (d *Director) Pass(name string) (done func(), ok bool) {
	if m := d.methods[name]; m == nil || !m.tells {
		return nil, true
	}
	return d.view.Pass(name)
}

// Dependency implements [proxy.Depender].
func (d *Director) Dependency(name string) proxy.Dependency {
	if m := d.methods[name]; m != nil {
		return m.depends
	}
	return proxy.Independent
}
