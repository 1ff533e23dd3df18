// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/pages"
)

const (
	// leaveTimeout is how long a Deployment's controller may take to notice that the Deployment
	// goes on.
	leaveTimeout  = 30 * time.Second
	leaveInterval = 250 * time.Millisecond
)

// Left is what Leave has done.
type Left struct {
	// Resumed is how many Deployments go on again, InService how many pods had their gates opened.
	Resumed, InService int
}

// Leave prepares for an uninstall of the controller: Deployments that rollouts have paused go on,
// and gates of pods are opened. The pods keep their images. c must read past the cache, and no
// controller may be at work. Leave goes on after an error.
func Leave(ctx context.Context, c client.Client, log logrus.FieldLogger) (Left, error) {
	r := &Reconciler{Client: c, APIReader: c, Log: log}
	r.prepare()
	left := Left{}
	var errs []error
	note := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	note("rollouts", r.leaveWorkloads(ctx, &left))
	note("Deployments", r.leaveDeployments(ctx, &left))
	opened, err := gates.OpenAll(ctx, c)
	left.InService = opened
	note("pods", err)
	return left, errors.Join(errs...)
}

// leaveWorkloads lets the workloads of all rollouts go on, as if the rollouts were deleted.
func (r *Reconciler) leaveWorkloads(ctx context.Context, left *Left) error {
	err := pages.Each(ctx, r.Client, &inplace.InPlaceRolloutList{},
		func(l *inplace.InPlaceRolloutList) []inplace.InPlaceRollout { return l.Items },
		func(o *inplace.InPlaceRollout) error {
			if !slices.Contains(o.Finalizers, inplace.RolloutFinalizer) {
				return nil
			}
			return r.leaveWorkload(ctx, o, left)
		})
	if meta.IsNoMatchError(err) {
		return nil
	}
	return err
}

func (r *Reconciler) leaveWorkload(ctx context.Context, rollout *inplace.InPlaceRollout, left *Left) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	for first := true; ; first = false {
		p := r.newPass(rollout)
		t, err := p.env.Find(ctx)
		var why *apierror.SpecError
		if errors.As(err, &why) || err == nil && t.Workload == nil {
			return nil
		}
		settled := false
		if err == nil {
			settled, err = t.Workload.Resume(ctx)
		}
		if settled && err == nil {
			if d, ok := t.Workload.Object().(*appsv1.Deployment); ok && !first {
				left.Resumed++
				p.log.WithField("deployment", d.Name).Info("the Deployment goes on")
			}
			return nil
		}
		if !retry.Sleep(ctx, leaveInterval) {
			return errors.Join(errors.New("the workload does not go on yet"), err)
		}
	}
}

// leaveDeployments lets Deployments go on that were paused by a rollout which does not exist any
// more.
func (r *Reconciler) leaveDeployments(ctx context.Context, left *Left) error {
	return pages.Each(ctx, r.Client, &appsv1.DeploymentList{},
		func(l *appsv1.DeploymentList) []appsv1.Deployment { return l.Items }, func(d *appsv1.Deployment) error {
			if d.Annotations[inplace.PausedByAnnotation] == "" {
				return nil
			}
			before := d.DeepCopy()
			delete(d.Annotations, inplace.PausedByAnnotation)
			d.Spec.Paused = false
			left.Resumed++
			return r.Client.Patch(ctx, d, client.MergeFrom(before))
		})
}
