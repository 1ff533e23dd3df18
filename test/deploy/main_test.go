// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// The cluster of this run, the root of the checkout, and the controller's image in the bed's
// registry.
var (
	bed      *testbed.Bed
	api      client.Client
	root     string
	imageRef string
)

const tag = "test"

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "deploy:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	if root, err = testbed.SourceDir(""); err != nil {
		return 0, err
	}
	ctrllog.SetLogger(logr.Discard()) // the clients of this package say nothing of interest
	failed := false
	bed, err = testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Race: true, Log: os.Stderr, KeepLogs: func() bool { return failed },
		// With one at a time the rollout would wait until the slow pull is through.
		ProxyArgs: []string{"--images-parallel", "2"},
		// See the package comment.
		APIServerArgs: []string{"--enable-aggregator-routing"},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, bed.Close(ctx)) }()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	if err != nil {
		return 0, err
	}
	config.QPS, config.Burst = 200, 400
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme),
		v1beta1.AddToScheme(scheme), inplace.AddToScheme(scheme)); err != nil {
		return 0, err
	}
	if api, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return 0, err
	}
	if err := enrolIn(ctx, "cri-proxy-system"); err != nil {
		return 0, err
	}
	imageRef = bed.Image("cri-controller")
	code = m.Run()
	failed = code != 0
	return code, nil
}

// enrolIn makes the node ask the controller in a namespace for its certificate, with kubelet's own
// kubeconfig, as a user would.
func enrolIn(ctx context.Context, namespace string) error {
	var config map[string]any
	text, err := os.ReadFile(bed.ProxyConfig())
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(text, &config); err != nil {
		return err
	}
	config["ops"] = map[string]any{"address": bed.OpsAddress,
		"enrol": map[string]any{"kubeconfig": bed.KubeletKubeconfig(), "namespace": namespace}}
	if text, err = yaml.Marshal(config); err != nil {
		return err
	}
	if err := os.WriteFile(bed.ProxyConfig(), text, 0o644); err != nil {
		return err
	}
	return bed.RestartProxy(ctx, syscall.SIGTERM)
}

// TestDeploy is one story: what is installed first is there for the steps after it.
func TestDeploy(t *testing.T) {
	for _, step := range []struct {
		name string
		test func(*testing.T)
	}{
		{"image", testImage},
		{"kustomize", testKustomize},
		{"permissions", testPermissions},
		{"identity", testIdentity},
		{"bypass", testBypass},
		{"doctor", testDoctor},
		{"webhooks", testWebhooks},
		{"the webhooks' certificate", testCertificate},
		{"the leader is killed", testLeaderKilled},
		{"the leader is deleted", testLeaderDeleted},
		{"no controller", testAway},
		{"helm", testHelm},
	} {
		if !t.Run(step.name, step.test) {
			return
		}
	}
}

// program runs a Go program of tools/deploy, such as helm, in the root of the checkout.
func program(t *testing.T, args ...string) (string, error) {
	t.Helper()
	home := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = filepath.Join(root, "tools", "deploy")
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "CGO_ENABLED=0", "KUBECONFIG="+bed.Kubeconfig,
		"HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// apiServer is what the pods are given for the kubernetes Service.
func apiServer(t *testing.T) (host, port string) {
	t.Helper()
	u, err := url.Parse(bed.APIServer)
	must(t, err)
	return u.Hostname(), u.Port()
}

// controllers returns the controller's pods when there are two and all are ready.
func controllers(t *testing.T, namespace string) []corev1.Pod {
	t.Helper()
	var list corev1.PodList
	eventually(t, "two controllers are ready", func() (string, bool) {
		must(t, api.List(t.Context(), &list, client.InNamespace(namespace),
			client.MatchingLabels{"app.kubernetes.io/name": "cri-controller"}))
		ready := 0
		said := ""
		for _, p := range list.Items {
			if isReady(&p) {
				ready++
			}
			for _, c := range p.Status.ContainerStatuses {
				said += fmt.Sprintf("%s %+v; ", p.Name, c.State)
			}
		}
		return said, ready == 2 && len(list.Items) == 2
	})
	return list.Items
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// leader waits until somebody other than not holds the Lease, and returns who: the pod's name and
// an ID of its process.
func leader(t *testing.T, namespace, not string) (pod, identity string) {
	t.Helper()
	eventually(t, "there is a leader", func() (string, bool) {
		var lease coordinationv1.Lease
		if err := api.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "cri-controller"},
			&lease); err != nil {
			return err.Error(), false
		}
		if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
			return "released", false
		}
		identity = *lease.Spec.HolderIdentity
		return identity, identity != not
	})
	pod, _, _ = strings.Cut(identity, "_")
	return pod, identity
}

// eventually waits for a condition in the cluster, which also says how things are.
func eventually(t testing.TB, what string, cond func() (string, bool)) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		how, ok := cond()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within 3 minutes: %s; it is: %s", what, how)
		}
		time.Sleep(50 * time.Millisecond) // polling another process
	}
}

func kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := bed.Kubectl(t.Context(), args...)
	must(t, err)
	return strings.TrimSpace(out)
}

func apply(t testing.TB, documents string) {
	t.Helper()
	must(t, bed.KubectlApply(t.Context(), documents))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
