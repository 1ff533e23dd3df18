// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package uninstall stops the controller and takes off what it has on objects and pods.
package uninstall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/finalizers"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/podready"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
	"github.com/cri-proxy/cri-proxy/controller/rollout"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
)

// DeploymentName is the controller's Deployment, in manifests and chart.
const DeploymentName = "cri-controller"

// stopInterval is how often to look for the controller's pods while they end.
const stopInterval = 500 * time.Millisecond

// departure is one run.
type departure struct {
	client client.Client
	// namespace is the controller's; lease is the Lease that a working controller holds.
	namespace, lease string
	log              *logrus.Logger
	out              io.Writer
}

// Run scales the controller's Deployment in a namespace to 0, waits until its pods are gone, and
// undoes what the controller has on objects and pods. It can be run again. lease is the name of the
// Lease that a working controller holds. Run tells out what it did.
func Run(ctx context.Context, config *rest.Config, namespace, lease string, log *logrus.Logger, out io.Writer) error {
	types, err := scheme.New()
	if err != nil {
		return err
	}
	c, err := client.New(config, client.Options{Scheme: types})
	if err != nil {
		return fmt.Errorf("API server %s: %w", config.Host, err)
	}
	d := &departure{client: c, namespace: namespace, lease: lease, log: log, out: out}
	if err := d.stop(ctx); err != nil {
		return fmt.Errorf("stop the controller in namespace %s: %w", namespace, err)
	}
	if err := d.clean(ctx); err != nil {
		return fmt.Errorf("not all could be taken off, run this again: %w", err)
	}
	return nil
}

// stop ends the controller: a working controller would put back what clean takes off.
func (d *departure) stop(ctx context.Context) error {
	var deployment appsv1.Deployment
	err := d.client.Get(ctx, client.ObjectKey{Namespace: d.namespace, Name: DeploymentName}, &deployment)
	if apierrors.IsNotFound(err) {
		return d.nobodyLeads(ctx)
	}
	if err != nil {
		return err
	}
	selector, err := metav1.LabelSelectorAsSelector(deployment.Spec.Selector)
	if err != nil {
		return err
	}
	if n := deployment.Spec.Replicas; n == nil || *n > 0 {
		before := deployment.DeepCopy()
		deployment.Spec.Replicas = new(int32)
		if err := d.client.Patch(ctx, &deployment, client.MergeFrom(before)); err != nil {
			return err
		}
		d.say("scaled Deployment %s/%s to 0", d.namespace, DeploymentName)
	}
	for {
		var pods corev1.PodList
		matching := client.MatchingLabelsSelector{Selector: selector}
		if err := d.client.List(ctx, &pods, client.InNamespace(d.namespace), matching); err != nil {
			return err
		}
		if len(pods.Items) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("its pod %s is still there: %w", pods.Items[0].Name, ctx.Err())
		case <-time.After(stopInterval):
		}
	}
}

// nobodyLeads looks for a controller that runs elsewhere.
func (d *departure) nobodyLeads(ctx context.Context) error {
	var lease coordinationv1.Lease
	err := d.client.Get(ctx, client.ObjectKey{Namespace: d.namespace, Name: d.lease}, &lease)
	if err != nil {
		return client.IgnoreNotFound(err)
	}
	s := lease.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return nil
	}
	if time.Since(s.RenewTime.Time) < time.Duration(*s.LeaseDurationSeconds)*time.Second {
		return fmt.Errorf("there is no Deployment %s, but %s holds the Lease %s: stop that controller first",
			DeploymentName, *s.HolderIdentity, d.lease)
	}
	return nil
}

// clean takes off what a controller that has ended left on the cluster's objects. It goes on after
// an error.
func (d *departure) clean(ctx context.Context) error {
	var errs []error
	note := func(err error) { errs = append(errs, err) }

	left, err := rollout.Leave(ctx, d.client, d.log)
	note(err)
	d.say("%d Deployments go on that a rollout had paused", left.Resumed)
	d.say("%d pods are in service again that waited at a gate of ours", left.InService)
	requests, err := recreate.Leave(ctx, d.client, d.log)
	note(err)
	d.say("%d requests had taken a pod out of service, which is in service again", requests)

	lookout := &kruise.Lookout{Reader: d.client, Mapper: d.client.RESTMapper(), Log: d.log}
	there, err := lookout.Look(ctx)
	note(err)
	ofRequests, ofJobs := []string{accept.Finalizer}, []string{v1beta1.PullFinalizer}
	kinds := []corev1.PodConditionType{inplace.ReadyGate, inplace.KruiseReadyGate}
	if !there && err == nil {
		opened, err := podready.Leave(ctx, d.client, d.log)
		note(err)
		d.say("%d pods are in service again that waited at the gate %s", opened,
			appsv1alpha1.KruisePodReadyConditionType)
		kinds = append(kinds, appsv1alpha1.KruisePodReadyConditionType)
		// Nobody else takes these off.
		ofRequests = append(ofRequests, appsv1alpha1.UnreadyAcquiredFinalizer)
		ofJobs = append(ofJobs, v1beta1.DeletionProtectionFinalizer)
	}
	for _, k := range []struct {
		kind  schema.GroupKind
		names []string
	}{
		{finalizers.Rollouts, []string{inplace.RolloutFinalizer}},
		{finalizers.Requests, ofRequests},
		{finalizers.PullJobs, ofJobs},
	} {
		n, err := finalizers.TakeOff(ctx, d.client, d.client.RESTMapper(), k.kind, k.names...)
		note(err)
		d.say("%d %ss had a finalizer", n, k.kind.Kind)
	}
	gated, err := gates.FindGated(ctx, d.client, kinds...)
	note(err)
	for _, g := range gated {
		d.say("WARNING: %s has the readiness gate %s in its template: "+
			"pods that it makes from now on will not be Ready; take the gate out", g.Workload, g.Gate)
	}
	return errors.Join(errs...)
}

func (d *departure) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }
