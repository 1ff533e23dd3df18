// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command demo shows cri-proxy at work on a one-node cluster whose kubelet talks to containerd only
// through the proxy. Each scene is a file: one of three containers of a pod is restarted with a
// ContainerRecreateRequest, a StatefulSet gets a new image in place under traffic, and an image is
// put on the node with an ImagePullJob before a pod needs it.
//
// With KEEP=1 in the environment the cluster stays up.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// timeout is for pods, requests and jobs; all take seconds.
const timeout = 2 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, os.Getenv("KEEP") != ""); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		os.Exit(1)
	}
}

type demo struct {
	out  io.Writer
	bed  *testbed.Bed
	api  client.WithWatch
	root string // of the checkout
}

func run(ctx context.Context, out io.Writer, keep bool) (err error) {
	began := time.Now()
	d := &demo{out: out}
	d.heading("A one-node cluster whose kubelet talks to containerd only through cri-proxy")
	d.bed, err = testbed.Start(ctx, testbed.Options{Mode: testbed.ModeCluster, Log: indent{out}, Detach: keep})
	if err != nil {
		return err
	}
	defer func() {
		if keep && err == nil {
			return
		}
		d.heading("Taking the cluster down")
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err = errors.Join(err, d.bed.Close(closing))
	}()
	if err := d.install(ctx); err != nil {
		return err
	}
	up := time.Since(began)
	for _, scene := range []func(context.Context) error{d.restart, d.upgrade, d.prepull} {
		if err := scene(ctx); err != nil {
			return err
		}
	}
	d.heading(fmt.Sprintf("Done: %s to a running cluster, %s in all", round(up), round(time.Since(began))))
	if keep {
		d.say("The cluster stays up. To look around:")
		d.say("    export KUBECONFIG=%s PATH=%s:$PATH", d.bed.Kubeconfig, d.bed.Bin)
		d.say("    kubectl get crr,ipr,imagepulljobs,pods -A -o wide")
		d.say("    cri-proxy ctl --admin-socket %s status", d.bed.AdminSocket)
		d.say("To take it down:")
		d.say("    go run ./test/cmd/testbed down %s", d.bed.ID)
	} else {
		d.say("make demo KEEP=1 leaves the cluster up.")
	}
	return nil
}

func (d *demo) install(ctx context.Context) error {
	config, err := clientcmd.BuildConfigFromFlags("", d.bed.Kubeconfig)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme),
		v1beta1.AddToScheme(scheme), inplace.AddToScheme(scheme)); err != nil {
		return err
	}
	if d.api, err = client.NewWithWatch(config, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	if d.root, err = testbed.SourceDir(""); err != nil {
		return err
	}
	d.heading("Installing the custom resource definitions and the controller")
	if err := d.kubectl(ctx, "", "apply", "-f", filepath.Join(d.root, "deploy", "crds")); err != nil {
		return err
	}
	if _, err := d.bed.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all",
		"--timeout=30s"); err != nil {
		return err
	}
	return d.bed.StartController(ctx)
}
