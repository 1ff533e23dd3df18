// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// Names in deploy/examples/nginx-preheat.yaml.
const (
	pullJob   = "nginx-preheat"
	pullImage = "nginx:latest"
)

// prepull puts an image on the node, and then starts a pod that uses it.
func (d *demo) prepull(ctx context.Context) error {
	// What is served as nginx:latest here: large enough that there is something to see.
	if err := d.bed.PushLargeImage(ctx, "library/"+pullImage, 8, 24); err != nil {
		return err
	}
	d.heading("An image of some 200 MiB is put on the node before anything needs it")
	file := filepath.Join(d.root, "deploy", "examples", "nginx-preheat.yaml") // as found in the field
	manifest, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	_, _ = indent{d.out}.Write(manifest)
	d.say("")
	if err := d.kubectl(ctx, "", "apply", "-f", file); err != nil {
		return err
	}
	job, err := d.followJob(ctx)
	if err != nil {
		return err
	}
	if job.Status.Succeeded != job.Status.Desired {
		return fmt.Errorf("the image is not on all nodes: %+v", job.Status)
	}
	if err := d.exec(ctx, filepath.Join(d.bed.Bin, "cri-proxy"), "ctl", "--admin-socket", d.bed.AdminSocket, "images"); err != nil {
		return err
	}

	d.heading("A pod that uses it starts without a pull")
	began := time.Now()
	if err := d.kubectl(ctx, "", "run", "web", "--image", pullImage, "--image-pull-policy", "IfNotPresent"); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "wait", "--for=condition=Ready", "pod/web", "--timeout=60s"); err != nil {
		return err
	}
	d.say("%8s  since it was created", round(time.Since(began)))
	d.say("")
	return d.startedWithoutPull(ctx)
}

// followJob shows the job as kubectl does, whenever that changes, until it has completed.
func (d *demo) followJob(ctx context.Context) (*v1beta1.ImagePullJob, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d.say("$ kubectl get imagepulljob %s --watch", pullJob)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last, seen := "", ""
	for {
		job := &v1beta1.ImagePullJob{}
		if err := d.api.Get(ctx, client.ObjectKey{Namespace: "default", Name: pullJob}, job); err != nil {
			return nil, err
		}
		s := job.Status
		if now := fmt.Sprint(s.Active, s.Succeeded, s.Failed, s.Progress, s.Message); now != last {
			last = now
			out, err := d.bed.Kubectl(ctx, "get", "imagepulljob", pullJob)
			if err != nil {
				return nil, err
			}
			titles, row, _ := strings.Cut(strings.TrimSpace(out), "\n")
			if seen == "" {
				d.say("%s", titles)
			}
			if row != seen {
				d.say("%s", row)
			}
			seen = row
		}
		if s.CompletionTime != nil {
			return job, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the job is not completed: %w; see the logs of cri-controller and cri-proxy in %s", ctx.Err(), d.bed.Logs)
		}
	}
}

// startedWithoutPull shows kubelet's own word for it.
func (d *demo) startedWithoutPull(ctx context.Context) error {
	var list corev1.EventList
	if err := d.api.List(ctx, &list, client.InNamespace("default"), client.MatchingFields{"involvedObject.name": "web"}); err != nil {
		return err
	}
	for _, e := range list.Items {
		if e.Source.Component != "kubelet" && e.ReportingController != "kubelet" {
			continue
		}
		d.say("%-8s %s", e.Reason, e.Message)
		if e.Reason == "Pulling" {
			return errors.New("kubelet has pulled the image")
		}
	}
	return nil
}
