// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package multinode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// The cluster of this run: two nodes, a third that joins in the first test, and two that join for a
// DaemonSet.
var (
	bed *testbed.Bed
	api client.Client
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "multinode:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	failed := false
	bed, err = testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Nodes: 5, Later: 3, Namespaces: true, Race: true, Log: os.Stderr,
		KeepLogs: func() bool { return failed },
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, bed.Close(ctx)) }()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	if err != nil {
		return 0, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1beta1.AddToScheme(scheme),
		inplace.AddToScheme(scheme)); err != nil {
		return 0, err
	}
	if api, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return 0, err
	}
	if err := errors.Join(bed.InstallCRDs(ctx), bed.StartController(ctx)); err != nil {
		return 0, err
	}
	code = m.Run()
	failed = code != 0
	return code, nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until polls a job until it is so, and returns it.
func until(t testing.TB, what, name string, so func(*v1beta1.ImagePullJob) bool) *v1beta1.ImagePullJob {
	t.Helper()
	job := &v1beta1.ImagePullJob{}
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) { // polling another process
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "default", Name: name}, job))
		if so(job) {
			return job
		}
		if time.Now().After(deadline) {
			t.Fatalf("job %s is not %s: %+v", name, what, job.Status)
		}
	}
}

// pulls are the node's pulls for the job.
func pulls(t testing.TB, n *testbed.Node, job *v1beta1.ImagePullJob) []*opsv1.PullOperation {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer func() { _ = conn.Close() }()
	list, err := opsv1.NewImagesClient(conn).ListPulls(t.Context(), &opsv1.ListPullsRequest{})
	must(t, err)
	var mine []*opsv1.PullOperation
	for _, op := range list.GetPulls() {
		if op.GetOwner() == fmt.Sprintf("ImagePullJob/%s/%s/%s", job.Namespace, job.Name, job.UID) {
			mine = append(mine, op)
		}
	}
	return mine
}

// image is an image as the node's containerd has it, or nil.
func image(t testing.TB, n *testbed.Node, name string) *runtimeapi.Image {
	t.Helper()
	conn, err := n.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	resp, err := runtimeapi.NewImageServiceClient(conn).
		ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	must(t, err)
	return resp.GetImage()
}
