// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"path"
	goruntime "runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

// buildMetric is always 1; its labels have the version.
func buildMetric() prometheus.Collector {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "criproxy_build_info", Help: "1, with the version of cri-proxy and the one of Go that it was built with.",
		ConstLabels: prometheus.Labels{"version": version.Short(), "goversion": goruntime.Version()},
	})
	g.Set(1)
	return g
}

// drains counts the calls that drain on this node, in this process and in its predecessor.
type drains struct {
	// here returns how many calls are left in this process, -1 when it does not drain.
	here func() int
	// before is the number in the predecessor; see [predecessor.follow]. Nil: there is none.
	before atomic.Pointer[int]
}

var (
	drainingDesc = prometheus.NewDesc("criproxy_draining",
		"1 while a process takes no new calls and answers those that it has: this one, "+
			"or the previous one after an upgrade.", []string{"process"}, nil)
	drainLeftDesc = prometheus.NewDesc("criproxy_drain_calls_left", "CRI calls that a process that drains has "+
		"still to answer.", []string{"process"}, nil)
)

// Describe implements [prometheus.Collector].
func (*drains) Describe(c chan<- *prometheus.Desc) { c <- drainingDesc; c <- drainLeftDesc }

// Collect implements [prometheus.Collector].
func (d *drains) Collect(c chan<- prometheus.Metric) {
	previous := -1
	if left := d.before.Load(); left != nil {
		previous = *left
	}
	for process, left := range map[string]int{"this": d.here(), "previous": previous} {
		draining := 0.0
		if left >= 0 {
			draining = 1
		}
		c <- prometheus.MustNewConstMetric(drainingDesc, prometheus.GaugeValue, draining, process)
		c <- prometheus.MustNewConstMetric(drainLeftDesc, prometheus.GaugeValue, float64(max(left, 0)), process)
	}
}

// commands counts commands, and knows the last commander.
type commands struct {
	calls *prometheus.CounterVec
	last  atomic.Pointer[commander]
}

// commander is the client that called last over TCP, and when.
type commander struct {
	name string
	at   time.Time
}

func newCommands() *commands {
	return &commands{calls: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "criproxy_ops_calls_total", Help: "Commands answered, by listener (admin or ops), method and gRPC code.",
	}, []string{"listener", "method", "code"})}
}

// Describe implements [prometheus.Collector].
func (c *commands) Describe(ch chan<- *prometheus.Desc) {
	c.calls.Describe(ch)
	ch <- lastDesc
}

// lastDesc has no sample before the first call: 0 would be a long time ago.
var lastDesc = prometheus.NewDesc("criproxy_ops_last_call_timestamp_seconds", "When a client was last let in "+
	"over TCP, in seconds since 1970.", nil, nil)

// Collect implements [prometheus.Collector].
func (c *commands) Collect(ch chan<- prometheus.Metric) {
	c.calls.Collect(ch)
	if last := c.last.Load(); last != nil {
		ch <- prometheus.MustNewConstMetric(lastDesc, prometheus.GaugeValue, float64(last.at.UnixMilli())/1000)
	}
}

// options returns server options that count the calls of a listener, however they end. Those in
// after come behind interceptors that know the client.
func (c *commands) options(listener string) (before, after []grpc.ServerOption) {
	count := func(method string, err error) {
		c.calls.WithLabelValues(listener, path.Base(method), status.Code(err).String()).Inc()
	}
	seen := func(ctx context.Context) {
		if name, ok := mtls.ClientName(ctx); ok {
			c.last.Store(&commander{name, time.Now()})
		}
	}
	before = []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo,
			handler grpc.UnaryHandler) (any, error) {
			resp, err := handler(ctx, req)
			count(info.FullMethod, err)
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo,
			handler grpc.StreamHandler) error {
			err := handler(srv, s)
			if method := info.FullMethod; srv != nil {
				count(method, err)
			} else {
				count("unknown", err) // no method of ours: the client has made it up
			}
			return err
		}),
	}
	after = []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo,
			handler grpc.UnaryHandler) (any, error) {
			seen(ctx)
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo,
			handler grpc.StreamHandler) error {
			seen(s.Context())
			return handler(srv, s)
		}),
	}
	return before, after
}
