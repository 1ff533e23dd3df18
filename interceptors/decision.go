// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/cri-proxy/cri-proxy/proxy"
)

// decision is what an interceptor did to a call, for metrics and traces.
type decision uint32

const (
	didHide       decision = 1 << iota // a container was kept from the caller
	didMask                            // a container was shown running that was not
	didCorrect                         // the start of a container was put right
	didAdopt                           // the caller got the container that an operation had ready
	didHold                            // the call waited for an operation, or the event for its end
	didYield                           // an operation was made to yield
	didSwitchOver                      // the stop became the moment at which the successor took over
	didOverride                        // the image of the pod's spec was replaced
	didRefuse                          // the caller was told to try again
	didStop                            // a successor was stopped too
	didRepeat                          // the call was made for a successor too
	didKeep                            // a sandbox was kept, because a successor runs in it
)

// decisions are the label values, in the order of the bits.
var decisions = []string{
	"hidden", "masked", "corrected", "adopted", "held", "yielded",
	"handed_over", "overridden", "refused", "stopped", "repeated", "kept",
}

// passed is the label value of a call that an interceptor took and did nothing of that to.
const passed = "passed"

// decided collects the decisions of one call. A nil one collects nothing.
type decided struct{ set atomic.Uint32 }

func (d *decided) add(what decision) {
	if d != nil {
		d.set.Or(uint32(what))
	}
}

// decidedKey is that of a *decided in a context.
type decidedKey struct{}

func decidedIn(ctx context.Context) *decided {
	d, _ := ctx.Value(decidedKey{}).(*decided)
	return d
}

// did notes a decision about the call of ctx.
func did(ctx context.Context, what decision) { decidedIn(ctx).add(what) }

// decisionAttribute has the decisions on a call's span.
const decisionAttribute = attribute.Key("criproxy.decisions")

// counter counts the decisions of one interceptor. What is never decided has no series.
type counter struct {
	name string
	vec  *prometheus.CounterVec
}

func newDecisions(r prometheus.Registerer) (*prometheus.CounterVec, error) {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "criproxy_interceptor_decisions_total",
		Help: "What interceptors did to calls and stream messages, by CRI method and decision; " +
			"a call may count under several.",
	}, []string{"interceptor", "decision"})
	if r == nil {
		return v, nil
	}
	return v, r.Register(v)
}

func newCounter(v *prometheus.CounterVec, method string) *counter {
	return &counter{name: method[strings.LastIndexByte(method, '/')+1:], vec: v}
}

func (c *counter) count(set uint32) {
	for _, name := range namesOf(set) {
		c.vec.WithLabelValues(c.name, name).Inc()
	}
}

// namesOf are the label values of a set.
func namesOf(set uint32) []string {
	var names []string
	for i, name := range decisions {
		if set&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return names
}

// unary counts what an interceptor decides.
func (c *counter) unary(take proxy.UnaryInterceptor) proxy.UnaryInterceptor {
	return func(ctx context.Context, method string, req []byte, next proxy.UnaryNext) ([]byte, error) {
		var d decided
		resp, err := take(context.WithValue(ctx, decidedKey{}, &d), method, req, next)
		set := d.set.Load()
		if set == 0 {
			c.vec.WithLabelValues(c.name, passed).Inc()
			return resp, err
		}
		c.count(set)
		if span := trace.SpanFromContext(ctx); span.IsRecording() {
			span.SetAttributes(decisionAttribute.StringSlice(namesOf(set)))
		}
		return resp, err
	}
}

// stream counts what a filter decides, message by message. Those that pass are not counted.
func (c *counter) stream(take proxy.StreamInterceptor) proxy.StreamInterceptor {
	return func(ctx context.Context, method string, req []byte) ([]byte, proxy.StreamFilter, error) {
		d := &decided{}
		upstream, filter, err := take(context.WithValue(ctx, decidedKey{}, d), method, req)
		if filter == nil || err != nil {
			return upstream, filter, err
		}
		return upstream, &countedFilter{StreamFilter: filter, decided: d, counter: c, span: trace.SpanFromContext(ctx)},
			nil
	}
}

// countedFilter is a filter whose decisions are counted.
type countedFilter struct {
	proxy.StreamFilter
	decided *decided
	counter *counter
	span    trace.Span
	all     uint32
}

// Message implements [proxy.StreamFilter].
func (f *countedFilter) Message(msg []byte) ([][]byte, error) {
	out, err := f.StreamFilter.Message(msg)
	if set := f.decided.set.Swap(0); set != 0 {
		f.counter.count(set)
		f.all |= set
	}
	return out, err
}

// Close implements [proxy.StreamFilter].
func (f *countedFilter) Close() {
	if f.all != 0 && f.span.IsRecording() {
		f.span.SetAttributes(decisionAttribute.StringSlice(namesOf(f.all)))
	}
	f.StreamFilter.Close()
}
