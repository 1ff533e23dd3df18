// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/cri-proxy/cri-proxy/proxy/internal/listener"
)

// streamEndGrace is how long a drain waits for event streams to take their last
// status once they are ended. Only a client that has stopped reading needs more,
// and that one is cut.
const streamEndGrace = time.Second

// CallRecorder is told about every call once it is answered. req is the encoded
// request of unary and server-streaming calls, nil for others; it is a copy that
// the recorder may keep. Recording costs that copy: it is meant for tests and
// debugging.
type CallRecorder interface {
	Record(method string, req []byte, code codes.Code)
}

// Options are the settings of [NewServer]. The zero value is a pure passthrough.
type Options struct {
	// Director chooses the interceptors. Nil: every call passes undecoded.
	Director Director
	// Log gets interceptor faults and the course of a drain. Nil: no logging.
	Log logrus.FieldLogger
	// Registerer gets the metrics criproxy_*. Nil: they are kept but not served.
	Registerer prometheus.Registerer
	// Tracer makes a span for every call whose caller traces it, and for others as its sampler
	// says. Nil: none, and trace context goes through as it comes.
	Tracer trace.Tracer
	// Recorder sees every call. Nil: none.
	Recorder CallRecorder
	// Probe, if not empty, is a secret: a call of [ProbeMethod] that has it under [ProbeKey] goes
	// through everything that kubelet's calls go through, and is answered with an empty message in
	// place of the runtime's. It is not counted.
	Probe string
	// Register adds services that the proxy answers itself, such as a health
	// service for a watchdog. They must not carry a name that the runtime
	// serves (containerd has grpc.health.v1.Health): it would be hidden.
	Register func(grpc.ServiceRegistrar)
}

// Stats are counts since the start of the server.
type Stats struct {
	Calls             uint64    // calls begun
	CallErrors        uint64    // calls answered with a code other than OK
	Intercepted       uint64    // calls that an interceptor took part in
	InterceptorFaults uint64    // interceptor errors and panics passed over
	InFlight          uint64    // calls not answered yet
	LastCall          time.Time // begin of the latest call; zero: none yet
	LastUserAgent     string    // its user agent, such as grpc-go/1.79.1
	// UnknownMethods are the CRI methods that were called and that the cri-api linked here does not
	// have, such as runtime.v1.RuntimeService/ListContainers2, ordered.
	UnknownMethods []string
}

// Server answers CRI calls by forwarding them to the runtime.
type Server struct {
	up       *Upstream
	director atomic.Pointer[Director]
	recorder CallRecorder
	tracer   trace.Tracer // nil: off
	log      logrus.FieldLogger
	codec    rawCodec
	register func(grpc.ServiceRegistrar)
	probe    string
	options  []grpc.CallOption // of every upstream call

	methods map[string]*method
	unknown *method
	newer   newerMethods
	metrics *metrics

	inflight      inflight
	calls         atomic.Uint64
	callErrors    atomic.Uint64
	intercepted   atomic.Uint64
	faults        atomic.Uint64
	lastCall      atomic.Int64 // Unix nanoseconds
	lastUserAgent atomic.Pointer[string]
	unread        atomic.Int64 // bytes of answers that clients have not read

	mu          sync.Mutex // guards all following fields
	listeners   map[*listener.Acceptor]struct{}
	generation  *generation          // takes new connections
	generations map[*generation]bool // those that serve
	over        bool
}

// NewServer makes a server that forwards to up. It does not listen: see Serve.
func NewServer(up *Upstream, o Options) *Server {
	s := &Server{
		up: up, recorder: o.Recorder, tracer: o.Tracer, log: o.Log, codec: newRawCodec(),
		register: o.Register, probe: o.Probe,
		listeners: map[*listener.Acceptor]struct{}{}, generations: map[*generation]bool{},
	}
	if s.log == nil {
		s.log = discardLogger()
	}
	s.options = []grpc.CallOption{grpc.ForceCodecV2(s.codec)}
	s.metrics = newMetrics(o.Registerer, s, up, s.log)
	s.unknown = &method{shape: bidi, dependency: Independent, metrics: s.metrics.method(unknownMethod)}
	s.methods = make(map[string]*method)
	for _, m := range criMethods() {
		m.metrics = s.metrics.method(m.name)
		s.methods[m.name] = &m
	}
	s.SetDirector(o.Director)
	s.generation = s.newGeneration()
	return s
}

// Drain ends the server without failing a call: it stops accepting, tells the
// clients to go elsewhere (GOAWAY) and waits for the calls in flight. Event
// streams never end by themselves, so once only they remain, or ctx is done,
// they are ended with Unavailable. Calls that are still open when ctx is done are
// cut, and the error says how many.
func (s *Server) Drain(ctx context.Context) error {
	// gone closes when every client has taken the GOAWAY and left. The goroutine
	// ends with the last call, which Stop below sees to; only an interceptor that
	// works on detached from its caller can keep it longer.
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		var stops sync.WaitGroup
		for _, g := range s.finish() {
			stops.Go(g.grpc.GracefulStop)
		}
		stops.Wait()
	}()
	defer s.Stop()

	err := s.inflight.wait(ctx, s.inflight.finite)
	s.inflight.endStreams(true)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), streamEndGrace)
	defer cancel()
	for err == nil {
		// Calls that crossed the GOAWAY on the wire are still completed.
		select {
		case <-gone:
			return nil
		case <-ctx.Done():
		case <-grace.Done():
		}
		if s.inflight.finite() == 0 {
			return nil
		}
		err = s.inflight.wait(ctx, s.inflight.finite)
	}
	_ = s.inflight.wait(grace, s.inflight.streams)
	if n := s.inflight.finite(); n > 0 {
		s.log.WithField("calls", n).Warn("drain is out of time, calls are cut")
		return fmt.Errorf("drain: %d calls cut: %w", n, err)
	}
	return nil
}

// Stop ends the server at once. Calls in flight are cut: their contexts are
// cancelled, and an interceptor that works on detached from its caller is not
// waited for.
func (s *Server) Stop() {
	s.inflight.endStreams(true)
	for _, g := range s.finish() {
		s.hangUp(g)
		g.grpc.Stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), streamEndGrace)
	defer cancel()
	_ = s.inflight.wait(ctx, s.inflight.goroutines)
}

// SetDirector changes who chooses the interceptors. Calls under way keep theirs.
func (s *Server) SetDirector(d Director) {
	depender, _ := d.(Depender)
	s.inflight.mu.Lock()
	defer s.inflight.mu.Unlock()
	for _, m := range s.methods {
		switch {
		case d == nil || m.endless:
			m.dependency = Independent
		case depender == nil:
			m.dependency = UntilAnswered
		default:
			m.dependency = depender.Dependency(m.name)
		}
	}
	if d == nil {
		s.director.Store(nil)
		return
	}
	s.director.Store(&d)
}

// InFlight returns how many calls of a CRI method are not answered yet. name is its full name.
func (s *Server) InFlight(name string) int {
	m := s.methods[name]
	if m == nil {
		return 0
	}
	s.inflight.mu.Lock()
	defer s.inflight.mu.Unlock()
	return m.inFlight
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	st := Stats{
		Calls:             s.calls.Load(),
		CallErrors:        s.callErrors.Load(),
		Intercepted:       s.intercepted.Load(),
		InterceptorFaults: s.faults.Load(),
		InFlight:          uint64(s.inflight.count()),
	}
	if ns := s.lastCall.Load(); ns != 0 {
		st.LastCall = time.Unix(0, ns)
	}
	st.UnknownMethods = s.newer.list()
	if ua := s.lastUserAgent.Load(); ua != nil {
		st.LastUserAgent = *ua
	}
	return st
}
