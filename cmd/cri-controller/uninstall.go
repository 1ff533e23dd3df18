// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/finalizers"
	"github.com/cri-proxy/cri-proxy/controller/kruise"
	"github.com/cri-proxy/cri-proxy/controller/rollout"
	"github.com/cri-proxy/cri-proxy/internal/version"
)

const (
	// deploymentName is the controller's own, in manifests and chart.
	deploymentName = "cri-controller"
	// defaultNamespace is where the manifests put it.
	defaultNamespace = "cri-proxy-system"
	// stopPause is how often the controller's pods are looked for while they end.
	stopPause = 500 * time.Millisecond
)

// departure is what uninstall does.
type departure struct {
	client    client.Client
	namespace string
	log       *logrus.Logger
	out       io.Writer
}

func uninstallCommand() *cobra.Command {
	s := settings{logLevel: "info", format: "text"}
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Stop the controller and take off what it has on objects and pods, before its manifests are deleted",
		Long: `Without a controller, its finalizers would keep objects and their namespaces from being deleted, pods whose readiness gate it has closed would stay out
of service, and Deployments that it has paused would stay so. This command scales the Deployment ` + deploymentName + ` to 0, waits until its pods are gone, and
undoes all of that. Requests, jobs and rollouts stay, and so do the images that pods have. It can be run again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return uninstall(ctx, s, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.kubeconfig, "kubeconfig", "", "kubeconfig file; empty means $KUBECONFIG, then the pod's service account")
	f.StringVar(&s.namespace, "namespace", "", "namespace of the controller; empty means the pod's own, outside a pod "+defaultNamespace)
	f.StringVar(&s.logLevel, "log-level", "info", "error, warn, info, debug or trace")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long all of it may take")
	return cmd
}

func uninstall(ctx context.Context, s settings, stdout, stderr io.Writer) error {
	log, err := newLog(s, stderr)
	if err != nil {
		return err
	}
	config, err := restConfig(s.kubeconfig)
	if err != nil {
		return err
	}
	config.UserAgent = "cri-controller-uninstall/" + version.Short()
	scheme, err := controller.NewScheme()
	if err != nil {
		return err
	}
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("API server %s: %w", config.Host, err)
	}
	if s.namespace == "" {
		s.namespace = defaultNamespace
		if text, err := os.ReadFile(namespaceFile); err == nil {
			s.namespace = strings.TrimSpace(string(text))
		}
	}
	d := &departure{client: c, namespace: s.namespace, log: log, out: stdout}
	if err := d.stop(ctx); err != nil {
		return fmt.Errorf("stop the controller in namespace %s: %w", s.namespace, err)
	}
	if err := d.clean(ctx); err != nil {
		return fmt.Errorf("not all could be taken off, run this again: %w", err)
	}
	return nil
}

// stop ends the controller: one that works would put back what is taken off.
func (d *departure) stop(ctx context.Context) error {
	var deployment appsv1.Deployment
	err := d.client.Get(ctx, client.ObjectKey{Namespace: d.namespace, Name: deploymentName}, &deployment)
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
		d.say("scaled Deployment %s/%s to 0", d.namespace, deploymentName)
	}
	for {
		var pods corev1.PodList
		if err := d.client.List(ctx, &pods, client.InNamespace(d.namespace), client.MatchingLabelsSelector{Selector: selector}); err != nil {
			return err
		}
		if len(pods.Items) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("its pod %s is still there: %w", pods.Items[0].Name, ctx.Err())
		case <-time.After(stopPause):
		}
	}
}

// nobodyLeads looks for a controller that runs elsewhere.
func (d *departure) nobodyLeads(ctx context.Context) error {
	var lease coordinationv1.Lease
	err := d.client.Get(ctx, client.ObjectKey{Namespace: d.namespace, Name: leaseName}, &lease)
	if err != nil {
		return client.IgnoreNotFound(err)
	}
	s := lease.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return nil
	}
	if time.Since(s.RenewTime.Time) < time.Duration(*s.LeaseDurationSeconds)*time.Second {
		return fmt.Errorf("there is no Deployment %s, but %s holds the Lease %s: stop that controller first", deploymentName, *s.HolderIdentity, leaseName)
	}
	return nil
}

// clean takes off what a controller that has ended left on the cluster's objects. It goes on after an error.
func (d *departure) clean(ctx context.Context) error {
	var errs []error
	note := func(err error) { errs = append(errs, err) }

	left, err := rollout.Leave(ctx, d.client, d.log)
	note(err)
	d.say("%d Deployments go on that a rollout had paused", left.Resumed)
	d.say("%d pods are in service again that waited at a gate of ours", left.InService)
	requests, err := controller.Leave(ctx, d.client, d.log)
	note(err)
	d.say("%d requests had taken a pod out of service, which is in service again", requests)

	lookout := &kruise.Lookout{Reader: d.client, Mapper: d.client.RESTMapper(), Log: d.log}
	there, err := lookout.Look(ctx)
	note(err)
	ofRequests, ofJobs := []string{controller.OperationFinalizer}, []string{v1beta1.PullFinalizer}
	gates := []corev1.PodConditionType{inplace.ReadyGate, inplace.KruiseReadyGate}
	if !there && err == nil {
		opened, err := controller.LeavePodReady(ctx, d.client, d.log)
		note(err)
		d.say("%d pods are in service again that waited at the gate %s", opened, appsv1alpha1.KruisePodReadyConditionType)
		gates = append(gates, appsv1alpha1.KruisePodReadyConditionType)
		// Nobody else takes these off.
		ofRequests = append(ofRequests, appsv1alpha1.UnreadyAcquiredFinalizer)
		ofJobs = append(ofJobs, v1beta1.DeletionProtectionFinalizer)
	}
	for _, k := range []struct {
		kind  schema.GroupKind
		names []string
	}{{rolloutKind, []string{inplace.RolloutFinalizer}}, {requestKind, ofRequests}, {jobKind, ofJobs}} {
		n, err := finalizers.TakeOff(ctx, d.client, d.client.RESTMapper(), k.kind, k.names...)
		note(err)
		d.say("%d %ss had a finalizer", n, k.kind.Kind)
	}
	gated, err := rollout.FindGated(ctx, d.client, gates...)
	note(err)
	for _, g := range gated {
		d.say("WARNING: %s has the readiness gate %s in its template: pods that it makes from now on will not be Ready; take the gate out", g.Workload, g.Gate)
	}
	return errors.Join(errs...)
}

func (d *departure) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }
