// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// shape says how a method's calls are relayed.
type shape int

const (
	// bidi fits every method: frames in both directions as they come.
	bidi shape = iota
	// unary is one request and one answer, relayed without extra goroutines.
	unary
	// serverStream is one request and any number of answers.
	serverStream
)

// method is what the proxy knows about a CRI method, plus its counters.
type method struct {
	name  string // full name, such as /runtime.v1.RuntimeService/Version
	shape shape
	// endless methods stream until one side leaves: a drain does not wait for
	// them. The Stream* lists end by themselves and are waited for (KEP-5825).
	endless bool
	metrics *methodMetrics

	// The rest is guarded by inflight.mu.
	dependency Dependency
	inFlight   int // calls that are not answered yet
	depending  int // those of them that depend on the director, see [Server.Hold]
}

// criMethods lists the methods of both CRI services from the descriptors that
// cri-api registers. Methods of newer kubelets are not in it; they are relayed
// as bidirectional streams, which carry unary calls just as well.
func criMethods() []method {
	services := runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	var all []method
	for i := range services.Len() {
		service := services.Get(i)
		for j := range service.Methods().Len() {
			all = append(all, criMethod(service, service.Methods().Get(j)))
		}
	}
	return all
}

func criMethod(s protoreflect.ServiceDescriptor, m protoreflect.MethodDescriptor) method {
	r := method{name: "/" + string(s.FullName()) + "/" + string(m.Name())}
	switch {
	case m.IsStreamingClient():
		r.shape = bidi
	case m.IsStreamingServer():
		r.shape = serverStream
		r.endless = !strings.HasPrefix(string(m.Name()), "Stream")
	default:
		r.shape = unary
	}
	return r
}

const (
	// maxNewer bounds how many names of unknown methods are kept: callers choose them. The CRI has
	// some forty methods altogether.
	maxNewer = 32
	// maxMethodName is more than twice as long as the longest method of the CRI, with its service.
	maxMethodName = 128
)

// newerMethods are the CRI methods that were called and are not among [criMethods].
type newerMethods struct {
	mu    sync.Mutex // guards names
	names map[string]struct{}
}

// note keeps the name of a method, if it may be one of the CRI's.
func (n *newerMethods) note(name string) {
	name = strings.TrimPrefix(name, "/")
	if !strings.HasPrefix(name, "runtime.") || len(name) > maxMethodName || strings.ContainsFunc(name, notOfNames) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.names == nil {
		n.names = make(map[string]struct{})
	}
	if len(n.names) < maxNewer {
		n.names[name] = struct{}{}
	}
}

// notOfNames reports whether no protobuf identifier, service or method has the character.
func notOfNames(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '_', r == '.', r == '/':
		return false
	}
	return true
}

func (n *newerMethods) list() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.names))
}
