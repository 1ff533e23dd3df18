// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cri-proxy/cri-proxy/api/identity"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/mtls"
	"github.com/cri-proxy/cri-proxy/ops/enrol"
)

// identify makes the credentials of the ops API over TCP, if it is on. They come from files, which
// must be valid, or from the controller, which may sign them later.
func (n *node) identify() error {
	o := n.config.Ops
	if o.Address == "" {
		return nil
	}
	server := mtls.ServerOptions{
		CertFile: o.CertFile, KeyFile: o.KeyFile, ClientCAFile: o.ClientCAFile,
		AllowedClients: n.allowedClients(), Log: n.log,
	}
	if o.Enrol.Kubeconfig != "" {
		dir := n.config.StateDir
		n.enroller = enrol.New(enrol.Options{
			Kubeconfig: o.Enrol.Kubeconfig, Environ: n.callers.KubeletsEnviron, Namespace: o.Enrol.Namespace,
			NodeName: n.config.NodeName, StateDir: dir, Log: n.log,
		})
		server.CertFile, server.KeyFile = enrol.CertFile(dir), enrol.CertFile(dir)
		server.ClientCAFile = enrol.CAFile(dir)
		server.Awaited, server.Unknown = n.enroller.Awaited, n.enroller.Refresh
		n.registry.MustRegister(
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "criproxy_enrolment_failures",
				Help: "How often in a row the node could not get a certificate, or news of the controller's CA; " +
					"0: all is well.",
			}, func() float64 { return float64(n.enroller.Status().Failures) }),
			prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: "criproxy_enrolments_total",
				Help: "Certificates that the controller has signed for this process.",
			}, func() float64 { return float64(n.enroller.Status().Enrolments) }),
		)
	}
	var err error
	if n.creds, err = mtls.NewServer(server); err != nil {
		return err
	}
	n.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "criproxy_ops_certificate_expiry_timestamp_seconds",
		Help: "When the certificate of the ops API over TCP ends, in seconds since 1970; 0: there is none yet.",
	}, func() float64 {
		if c := n.creds.Certificate(); c != nil {
			return float64(c.NotAfter.Unix())
		}
		return 0
	}))
	return nil
}

// allowedClients are the names of clients that may command the node over TCP.
func (n *node) allowedClients() []string {
	if o := n.config.Ops; len(o.AllowedClients) > 0 || o.Enrol.Kubeconfig == "" {
		return o.AllowedClients
	}
	return []string{identity.ControllerName}
}

// identity describes the certificate of the ops API over TCP. It is nil if that is off.
func (n *node) identity() *opsv1.Identity {
	if n.creds == nil {
		return nil
	}
	i := &opsv1.Identity{Source: "files"}
	if c := n.creds.Certificate(); c != nil {
		i.ExpireTime = timestamppb.New(c.NotAfter)
	}
	if n.enroller == nil {
		return i
	}
	i.Source = "controller"
	st := n.enroller.Status()
	stamp := func(t time.Time) *timestamppb.Timestamp {
		if t.IsZero() {
			return nil
		}
		return timestamppb.New(t)
	}
	i.RenewTime, i.Since, i.RetryTime = stamp(st.Renewal), stamp(st.Since), stamp(st.NextTry)
	if st.Problem != nil {
		i.Problem = st.Problem.Error()
	}
	return i
}

// startEnrolling renews the node's identity until stopEnrolling. It belongs to the state, so that
// only one of two processes renews it.
func (d *daemon) startEnrolling(ctx context.Context) {
	if d.enroller == nil {
		return
	}
	ctx, d.stopEnrol = context.WithCancel(context.WithoutCancel(ctx))
	d.workers.Go(func() { d.enroller.Run(ctx) }) // ends with stopEnrolling
}

// stopEnrolling does not wait for the end, because kubelet's calls may be held meanwhile. A file is
// written in one step, or not at all.
func (d *daemon) stopEnrolling() {
	if d.stopEnrol != nil {
		d.stopEnrol()
		d.stopEnrol = nil
	}
}
