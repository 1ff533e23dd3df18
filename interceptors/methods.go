// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import "github.com/cri-proxy/cri-proxy/proxy"

// method is how a [Director] treats the calls of one CRI method.
type method struct {
	// unary or stream takes a call. Both are nil if no call is ever taken.
	unary  proxy.UnaryInterceptor
	stream proxy.StreamInterceptor
	// take says which calls of a unary method are taken. Those of a stream always are.
	take take
	// depends says how long a call depends on the view.
	depends proxy.Dependency

	// tells says that the answer tells of containers. The call waits for the judge, see [Judge],
	// and while it passes undecoded it is counted, because it may carry what becomes hidden
	// meanwhile. Other answers show nothing that is hidden, however long they have been under way
	// when it is hidden: a call into a container, such as a hook of 30 s, is addressed to the one
	// that its caller knows.
	tells bool
	// judged makes other calls wait for the judge too. A stream never passes undecoded and is not
	// counted.
	judged bool
	// starts says that the answer has the start of a container in it.
	starts bool
	// relists says that kubelet begins a relist with this method. The sandboxes that it lists do
	// not matter to the view.
	relists bool
}

// take says which calls of a unary method are taken.
type take int

const (
	// always is for a method that is recorded, or whose end has to do with an operation that begins
	// while the call is under way.
	always take = iota
	// whileActive is for a method whose answer the view may change.
	whileActive
	// whileUnclaimed is for a method whose answer may have an image that is to be hidden.
	whileUnclaimed
)

// The services of the CRI.
const (
	runtimeService = "/runtime.v1.RuntimeService/"
	imageService   = "/runtime.v1.ImageService/"
)

// table returns how each method is treated. A method that is not in it passes, and nothing is noted
// of its calls.
//
// A call that depends on the view until it is forwarded may take long, and needs nothing of the
// view once the runtime has it: [view.Slots.Entangled] finds a stop in which an operation takes
// part, and the result of an exec goes out as the runtime gives it.
func table(l *lifecycle, a *answers, p *processes, i *imageCalls) map[string]*method {
	const forwarded, never = proxy.UntilForwarded, proxy.Independent
	table := map[string]*method{
		// Kubelet makes a container in a slot whose containers it has seen, and the name that it
		// takes may be a stray's: hence it waits for the judge.
		runtimeService + "CreateContainer":          {unary: l.createContainer, judged: true},
		runtimeService + "StartContainer":           {unary: l.startContainer},
		runtimeService + "StopContainer":            {unary: l.stopContainer, depends: forwarded},
		runtimeService + "RemoveContainer":          {unary: l.removeContainer},
		runtimeService + "UpdateContainerResources": {unary: l.updateContainerResources},

		runtimeService + "StopPodSandbox":     {unary: l.stopPodSandbox, depends: forwarded},
		runtimeService + "RemovePodSandbox":   {unary: l.removePodSandbox},
		runtimeService + "ListPodSandbox":     {relists: true, depends: never},
		runtimeService + "StreamPodSandboxes": {relists: true, depends: never},

		runtimeService + "ContainerStatus":  {unary: a.containerStatus, take: whileActive, tells: true, starts: true},
		runtimeService + "PodSandboxStatus": {unary: a.podSandboxStatus, take: whileActive, tells: true, starts: true},

		runtimeService + "ListContainers":   {unary: a.listContainers, take: whileActive, tells: true},
		runtimeService + "StreamContainers": {stream: a.streamContainers, judged: true},

		runtimeService + "ContainerStats":          {unary: a.containerStats, take: whileActive, tells: true},
		runtimeService + "ListContainerStats":      {unary: a.listContainerStats, take: whileActive, tells: true},
		runtimeService + "StreamContainerStats":    {stream: a.streamContainerStats, judged: true},
		runtimeService + "PodSandboxStats":         {unary: a.podSandboxStats, take: whileActive, tells: true},
		runtimeService + "ListPodSandboxStats":     {unary: a.listPodSandboxStats, take: whileActive, tells: true},
		runtimeService + "StreamPodSandboxStats":   {stream: a.streamPodSandboxStats, judged: true},
		runtimeService + "ListPodSandboxMetrics":   {unary: a.listPodSandboxMetrics, take: whileActive, tells: true},
		runtimeService + "StreamPodSandboxMetrics": {stream: a.streamPodSandboxMetrics, judged: true},

		runtimeService + "GetContainerEvents": {stream: a.getContainerEvents, judged: true},

		runtimeService + "ExecSync":            {unary: p.execSync, depends: forwarded},
		runtimeService + "Exec":                {unary: p.exec, take: whileActive, depends: forwarded},
		runtimeService + "Attach":              {unary: p.attach, take: whileActive, depends: forwarded},
		runtimeService + "CheckpointContainer": {unary: p.checkpointContainer, take: whileActive, depends: forwarded},
		runtimeService + "ReopenContainerLog":  {unary: p.reopenContainerLog, take: whileActive},

		imageService + "PullImage":   {unary: i.pullImage, depends: forwarded},
		imageService + "ImageStatus": {unary: i.imageStatus, take: whileUnclaimed, depends: never},
	}
	if i.pulls == nil {
		table[imageService+"PullImage"].unary = nil
	}
	if i.images == nil {
		table[imageService+"ImageStatus"].unary = nil
	}
	return table
}
