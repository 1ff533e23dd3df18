// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
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
	if err := d.exec(ctx, filepath.Join(d.bed.Bin, "cri-proxy"), "ctl", "--admin-socket", d.bed.AdminSocket,
		"images"); err != nil {
		return err
	}

	d.heading("A pod that uses it starts without a pull")
	began := time.Now()
	if err := d.kubectl(ctx, "", "run", "web", "--image", pullImage, "--image-pull-policy",
		"IfNotPresent"); err != nil {
		return err
	}
	if err := d.kubectl(ctx, "", "wait", "--for=condition=Ready", "pod/web", "--timeout=60s"); err != nil {
		return err
	}
	d.say("%8s  since it was created", round(time.Since(began)))
	d.say("")
	return d.startedWithoutPull(ctx)
}

// followJob watches the job until it has completed.
func (d *demo) followJob(ctx context.Context) (*v1beta1.ImagePullJob, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	watch := d.kubectlCommand(watching, "get", "imagepulljob", pullJob, "--watch")
	out, err := watch.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := watch.Start(); err != nil {
		return nil, err
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		d.say("%s", lines.Text())
		if strings.Contains(lines.Text(), "completed") {
			stop()
		}
	}
	if err := watch.Wait(); watching.Err() == nil || ctx.Err() != nil {
		return nil, fmt.Errorf("the job is not completed: %w; see the logs of cri-controller and cri-proxy in %s",
			errors.Join(err, ctx.Err()), d.bed.Logs)
	}
	job := &v1beta1.ImagePullJob{}
	return job, d.api.Get(ctx, client.ObjectKey{Namespace: "default", Name: pullJob}, job)
}

// startedWithoutPull shows kubelet's own word for it.
func (d *demo) startedWithoutPull(ctx context.Context) error {
	var list corev1.EventList
	if err := d.api.List(ctx, &list, client.InNamespace("default"),
		client.MatchingFields{"involvedObject.name": "web"}); err != nil {
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
